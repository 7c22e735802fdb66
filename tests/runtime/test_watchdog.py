"""What counts as progress. The watchdog runs in a process of its own, because it ends that process."""

import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch

from scmdm.config.loading import load_config
from scmdm.config.run import RunConfig
from scmdm.data.mixture import open_data
from scmdm.observability.step_timer import StepTimer
from scmdm.runtime.watchdog import _ALARM, HANG_EXIT, Watchdog, collective_timeout, set_aside_stacks
from scmdm.system.process_group import World
from scmdm.training import validation
from scmdm.training.setup import build_engine, build_spec
from tests.conftest import TINY

LIMIT_S = 3
SCRIPT = """
import sys, time
from pathlib import Path
from scmdm.system.process_group import World
from scmdm.runtime.watchdog import Watchdog

def hang_here():
    time.sleep(600)

with Watchdog(Path(sys.argv[1]), World(0, 1, 0), {minutes}) as watchdog:
    {body}
"""


def run(place, body, minutes=LIMIT_S / 60):
    script = SCRIPT.format(minutes=minutes, body=body)
    return subprocess.run([sys.executable, "-c", script, place], capture_output=True, text=True, timeout=120)


def test_no_progress_ends_the_process_with_its_stacks(tmp_path):
    done = run(tmp_path, "watchdog.step_done(7); watchdog.beat('sync'); hang_here()")
    assert done.returncode == HANG_EXIT, done.stderr
    text = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "| in sync, last step 7" in text
    assert "line 8 in hang_here" in text.split("\n\n")[0] and text.count("in hang_here") == 2
    assert "in sync, last step 7: rank 0" in done.stderr


def test_on_a_full_disk_the_other_ranks_are_alarmed_and_children_end(tmp_path):
    """A limit on the size of files stands in for the disk. A child that goes on would keep the pipe of `run` open."""
    child = "import multiprocessing as m; m.get_context('fork').Process(target=hang_here).start()"
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    done = run(tmp_path, f"{full}; {child}; hang_here()")
    assert done.returncode == HANG_EXIT, done.stderr
    assert (tmp_path / "stacks" / _ALARM).exists()
    assert (tmp_path / "stacks" / "rank_0.txt").read_text() == ""


def test_a_crash_writes_its_stacks_as_a_hang_does(tmp_path):
    done = run(tmp_path, "import ctypes; ctypes.string_at(0)", minutes=10)
    assert done.returncode < 0, done.stderr
    text = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "Segmentation fault" in text and "in string_at" in text


@pytest.mark.slow
def test_progress_and_patience_with_a_checkpoint(tmp_path):
    """Short parts and a checkpoint that last longer than the limit in all leave no file."""
    small = f"watchdog.step_done(1); [(time.sleep(0.5), watchdog.beat('validation')) for _ in range({3 * LIMIT_S})]"
    done = run(tmp_path, f"{small}; watchdog.beat('checkpoint'); time.sleep({LIMIT_S + 2})")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_limit_there_is_no_file_and_no_thread(tmp_path):
    before = threading.active_count()
    with Watchdog(tmp_path, World(0, 1, 0), 0) as watchdog:
        watchdog.beat("data")
        assert threading.active_count() == before and list(tmp_path.iterdir()) == []
    assert collective_timeout(0) is None and collective_timeout(10).total_seconds() > 4 * 600


def test_every_validation_batch_and_every_part_of_a_step_is_progress(molecules, tmp_path):
    keys = [f"run_dir={tmp_path}", f"data.path={molecules}", "train.steps=2", "train.validation_samples=64", *TINY]
    keys.append("train.micro_batch_size=16")
    config = load_config(RunConfig, None, keys)
    config.engine = "single"
    data = open_data(config.data)
    spec = build_spec(config, data.manifest, None)
    engine = build_engine(config, spec, None, torch.device("cpu"), torch.float32)
    signs = []
    validation.validation_nelbo(engine, config, spec, data, condition=False, on_batch=signs.append)
    assert signs == ["validation"] * (1 + 64 // 16)
    timer = StepTimer(engine.device, signs.append)
    with timer.part("data"):
        assert signs[-1] == "data"
    assert Counter(signs)["after data"] == 1


def test_records_of_nccl_are_set_aside_without_stacks(tmp_path):
    """NCCL ends the processes of a hang by itself when its timeout comes first."""
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank_0.txt").touch()
    (tmp_path / "stacks" / "nccl_trace_rank_1").write_bytes(b"record")
    set_aside_stacks(tmp_path)
    assert not (tmp_path / "stacks").exists()
    assert (tmp_path / "stacks.before" / "nccl_trace_rank_1").read_bytes() == b"record"
