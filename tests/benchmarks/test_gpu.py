"""The GPU kit: limits of its parts, and its rehearsal on a CPU."""

import json
import signal
import sys

import psutil
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


def test_an_interrupt_ends_the_part():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.run_part("samplers", 60, tiny=True, gpu=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not [child for child in psutil.Process().children() if "benchmarks.gpu_part" in child.cmdline()]


def test_each_run_has_files_of_its_own(tmp_path):
    record = {**gpu._environment(gpu=False), "tiny": True, "parts": {}}
    files = {gpu._write(tmp_path, {**record, "date": f"2026-01-02 03:04:0{second}"}) for second in (5, 6)}
    assert len(files) == 2 and set(tmp_path.glob("2026-01-02*.json")) == files


def test_a_part_that_does_not_exist_is_refused_before_any_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "samplers", "stepp"])
    assert ended.value.code == 2 and "'stepp'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
