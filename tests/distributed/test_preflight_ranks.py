"""Start-up checks between real ranks, one of which differs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import scmdm
from scmdm.data.manifest import Manifest
from tests.distributed.launching import launch

pytestmark = pytest.mark.slow


def errors(output):
    return [line for line in output.splitlines() if line.startswith("scmdm: error:")]


def launch_odd(kind, value, arguments):
    status, output = launch(2, kind, value, *arguments, module="tests.distributed.odd_rank")
    assert status != 0, output
    return errors(output), output


def test_a_rank_with_different_source_is_reported_with_the_file(adapt, tmp_path):
    """Two files differ; every rank prints the same line, and no step is trained."""
    package = Path(scmdm.__file__).parent
    shutil.copytree(package, tmp_path / "copy" / "scmdm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("training/step.py", "ops/top_k.py"):
        with (tmp_path / "copy" / "scmdm" / name).open("a") as file:
            file.write("# changed\n")
    run = tmp_path / "run"
    found, output = launch_odd("another_package", tmp_path / "copy", adapt(run, "train.micro_batch_size=32"))
    assert found and len(set(found)) == 1, output
    assert "rank 1 on " in found[0] and "source file ops/top_k.py is " in found[0] and "on rank 0 on " in found[0]
    assert found[0].endswith("install the same scmdm on every machine (and 1 more)")
    assert not (run / "metrics.jsonl").exists() and not (run / "starts.jsonl").exists()


def test_a_rank_with_a_different_key_is_reported_with_both_values(adapt, tmp_path):
    arguments = adapt(tmp_path / "run", "train.micro_batch_size=32")
    found, output = launch_odd("another_key", "optimizer.weight_decay=0.25", arguments)
    assert found and "key optimizer.weight_decay is 0.25, but 0.0 on rank 0 on " in found[0], output
    assert "start every rank with the same configuration" in found[0]


def test_a_rank_that_sees_another_run_directory(adapt, tmp_path):
    """As on machines without a common file system."""
    arguments = adapt(tmp_path / "run", "train.micro_batch_size=32")
    found, output = launch_odd("another_key", f"run_dir={tmp_path / 'elsewhere'}", arguments)
    assert found and f"mark in run_dir is missing from {tmp_path / 'elsewhere'}, but " in found[0], output


def test_a_rank_with_other_data(adapt, molecules, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(molecules, other)
    replace(Manifest.read(other), name="another").write(other)
    arguments = adapt(tmp_path / "run", "train.micro_batch_size=32")
    found, output = launch_odd("another_key", f"data.path={other}", arguments)
    assert found and "SHA-256 of the data is " in found[0] and "give every machine the same data" in found[0], output


def test_ranks_that_agree_log_the_measured_all_reduce(adapt, tmp_path):
    run = tmp_path / "run"
    status, output = launch(2, *adapt(run, "train.micro_batch_size=32", "train.steps=3"))
    assert status == 0, output
    assert "2 ranks on 1 machine(s) agree (checked" in (run / "train.log").read_text()
    (start,) = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert start["world_size"] == 2 and len(start["hosts"]) == 1 and start["git"]["commit"]
    assert start["all_reduce_gb_per_s"] > 0 and 0 < start["all_reduce_latency_us"] < 1e6
    assert start["seconds"] > 0
    assert not (run / ".start").exists()
