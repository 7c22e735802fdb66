"""NCCL's flight recorder: the environment on any machine, the record itself on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from scmdm.runtime.flight_recorder import dumping_to, enable_flight_recorder, recorder_environment
from scmdm.runtime.watchdog import watching_share
from scmdm.system.process_group import World

RECORD = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from scmdm.runtime.flight_recorder import dump_flight_recorder, enable_flight_recorder
enable_flight_recorder()
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(8, device="cuda"))
torch.cuda.synchronize()
dump_flight_recorder(Path(sys.argv[1]), 0)
dist.destroy_process_group()
"""


NAMES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    PLACE := "TORCH_FR_DUMP_TEMP_FILE",
    "SCMDM_FR_DUMP_TEMP_FILE",
)


@pytest.fixture
def unset(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def test_variables_that_the_user_has_set_are_kept(tmp_path, monkeypatch, unset):
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    enable_flight_recorder()
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7" and "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert int(os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == 1 and PLACE not in os.environ
    for name in (PLACE, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.setenv(name, "mine")
        with dumping_to(tmp_path):
            assert os.environ[name] == "mine" and os.environ.get(PLACE, "mine") == "mine"
        monkeypatch.delenv(name)


def test_a_record_is_written_beside_the_stacks_of_each_part(tmp_path, monkeypatch, unset):
    """The launcher's place is that of the launch; each training, and each share of an evaluation, has its own."""
    monkeypatch.chdir(tmp_path)
    os.environ.update(recorder_environment({}, tmp_path / "launch"))
    launched = os.environ[PLACE]
    with dumping_to((tmp_path / "run").relative_to(tmp_path)):
        assert os.environ[PLACE] == f"{tmp_path}/run/nccl_trace_rank_"
        with watching_share(tmp_path / "parts", World(0, 1, 0)):
            (stacks,) = (tmp_path / "parts").rglob("rank_0.txt")
            assert os.environ[PLACE] == f"{stacks.parent}/nccl_trace_rank_"
        assert os.environ[PLACE] == f"{tmp_path}/run/nccl_trace_rank_"
    assert os.environ[PLACE] == launched == f"{tmp_path}/launch/nccl_trace_rank_"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_record_holds_the_last_collective(tmp_path):
    subprocess.run([sys.executable, "-c", RECORD, tmp_path], check=True, timeout=300)
    assert b"all_reduce" in (tmp_path / "nccl_trace_rank_0").read_bytes()
