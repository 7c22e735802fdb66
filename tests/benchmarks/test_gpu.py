"""The GPU kit: limits of its parts, and its rehearsal on a CPU."""

import json
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu_part import PARTS


def test_the_parts_fit_into_eight_minutes():
    assert sum(limit for _, limit in PARTS.values()) <= gpu._LIMIT_S < 8 * 60


def test_a_part_is_cut_or_fails_and_is_recorded(monkeypatch):
    """The process is a real one, which sleeps or does not exist as a part."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    failed = gpu.run_part("samplers", 30, tiny=True, gpu=False)
    assert failed["status"] == "failed" and failed["error"] and failed["output"] == []
    monkeypatch.undo()
    cut = gpu.run_part("samplers", 0.05, tiny=True, gpu=False)
    assert cut["status"] == "cut" and cut["seconds"] < 20
    record = {**gpu._environment(gpu=False), "tiny": True, "parts": {"a": failed, "b": cut}}
    page = gpu.as_markdown(record)
    assert "## a: failed" in page and "## b: cut" in page


@pytest.mark.slow
def test_the_rehearsal_measures_every_part(tmp_path):
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert {"date", "revision", "gpu", "driver", "cuda", "cores", "python", "packages", "tiny"} < record.keys()
    assert "torch" in record["packages"] and record["parts"].keys() == PARTS.keys()
    statuses = {name: part["status"] for name, part in record["parts"].items()}
    assert set(statuses.values()) <= {"ok", "absent"} and statuses["step 170M"] == statuses["block cache"] == "ok"
    cached = record["parts"]["block cache"]["result"]
    assert cached["positions"]["blocks"] < cached["positions"]["none"] and cached["equal_tokens"] > 0.9
    for name, part in record["parts"].items():
        assert part["status"] == "absent" or part["result"]["config"], name
    step = record["parts"]["step 1B"]["result"]
    for kind in ("vanilla", "adaptation"):
        assert len(step[kind]["wall"]) == 5 and step[kind]["tokens_per_s"] > 0
    assert step["config"]["shape"]["model"]["width"] and record["parts"]["samplers"]["result"]["samples_per_s"]
    page = file.with_suffix(".md").read_text()
    assert all(f"| {name} |" in page for name in PARTS)
