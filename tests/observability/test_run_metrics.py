"""Metrics files with damaged lines, and disks on which nothing can be written for a while."""

import json
import logging
import os
import resource
import shutil
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmdm.checkpoint.reader import list_checkpoints
from scmdm.cli import main
from scmdm.errors import UserError
from scmdm.observability.run_metrics import LogFile, MetricsFile, last_row, logger, read_metrics
from scmdm.system import json_lines, line_file
from scmdm.system.line_file import LineFile
from tests.conftest import TINY, scmdm
from tests.processes import wait_until


def train_row(step, **more):
    return {"kind": "train", "step": step, "loss": 1 / step, "tokens": 10 * step, **more}


def text_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = [train_row(step) for step in range(1, 8)]
DAMAGED = {
    "null": b"null",
    "a number": b"12",
    "a list": b"[1, 2]",
    "text": b'"train"',
    "half a line": b'{"kind": "train", "st',
    "two lines in one": text_of(ROWS[:1]).strip() * 2,
    "not UTF-8": b'{"kind": "train", "step": 4, "loss": 1, "tokens": 1, "\xff": 1}',
    "NUL": bytes(50),
    "deep": b"[" * 100_000,
    "deep row": b'{"kind": "train", "step": 4, "loss": 1, "tokens": 1, "x": ' + b"[" * 100_000,
    "a huge number": b'{"kind": "train", "step": 4, "loss": 1' + b"0" * 400 + b', "tokens": 1}',
    "beyond floats": b'{"kind": "train", "step": 4, "loss": 1e400, "tokens": 1}',
    "a key twice": b'{"kind": "train", "step": 4, "step": 5, "loss": 1, "tokens": 1}',
    "no loss": b'{"kind": "train", "step": 4, "lost": 1, "tokens": 1}',
    "loss null": b'{"kind": "train", "step": 4, "loss": null, "tokens": 1}',
    "loss as text": b'{"kind": "train", "step": 4, "loss": "1", "tokens": 1}',
    "a flag": b'{"kind": "train", "step": 4, "loss": true, "tokens": 1}',
    "step of a fraction": b'{"kind": "train", "step": 4.5, "loss": 1, "tokens": 1}',
    "negative step": b'{"kind": "train", "step": -4, "loss": 1, "tokens": 1}',
    "another kind": b'{"kind": "traio", "step": 4, "loss": 1, "tokens": 1}',
    "a section": b'{"kind": "train", "step": 4, "loss": 1, "tokens": 1, "lr": {}}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_skipped_and_counted_by_number(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text_of(ROWS[:3]) + DAMAGED[damage] + b"\n" + text_of(ROWS[4:]))
    found = read_metrics(path)
    assert found.rows == ROWS[:3] + ROWS[4:] and found.damaged == [4]
    assert str(path) in found.problem and " 4" in found.problem
    assert last_row(path, "train") == ROWS[-1]
    path.write_bytes(text_of(ROWS) + DAMAGED[damage])
    assert read_metrics(path).damaged == [8]
    if len(DAMAGED[damage]) < 4000:  # only the end of the file is read
        assert last_row(path, "train") == ROWS[-1]


def test_nan_of_earlier_versions_is_null(tmp_path):
    row = {"kind": "validation", "step": 1, "nelbo_null": float("nan"), "tokens": 5}
    (tmp_path / "m").write_bytes(text_of([row]))
    assert read_metrics(tmp_path / "m").rows == [{**row, "nelbo_null": None}]
    file = MetricsFile(tmp_path / "new", 0)
    file.write(row)
    file.close()
    assert json.loads((tmp_path / "new").read_text(), parse_constant=pytest.fail)["nelbo_null"] is None


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "_LONGEST_LINE", 1000)
    path = tmp_path / "m"
    path.write_bytes(text_of(ROWS[:2]) + b"x" * 50_000 + b"\n" + text_of(ROWS[2:]) + b"y" * 50_000)
    found = read_metrics(path)
    assert found.rows == ROWS and found.damaged == [3, 9]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])
def test_what_is_not_a_file_is_named(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found.rows == [] and "metrics.jsonl" in found.problem
    assert last_row(tmp_path / "metrics.jsonl", "train") is None


@given(st.binary(max_size=300), st.integers(0, len(text_of(ROWS))), st.integers(0, 60))
@settings(max_examples=200)
def test_any_bytes_in_a_metrics_file(tmp_path_factory, data, start, removed):
    """Rows that the damage does not touch are read; a resume keeps those up to its step and writes a clean file."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    whole = text_of(ROWS)
    path.write_bytes(whole[:start] + data + whole[start + removed :])
    untouched, position = [], 0
    for row in ROWS:
        end = position + len(text_of([row]))
        if end <= start or position >= start + removed + 1:
            untouched.append(row)
        position = end
    found = read_metrics(path)
    assert all(row in found.rows for row in untouched)
    last_row(path, "train")
    MetricsFile(path, 5).close()
    kept = read_metrics(path)
    assert kept.problem is None and kept.rows == [row for row in found.rows if row["step"] <= 5]


def test_a_resume_keeps_the_damaged_file(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    before = text_of(ROWS[:3]) + b"null\n" + text_of(ROWS[4:])
    path.write_bytes(before)
    MetricsFile(path, 5).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 5]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert any("metrics.jsonl" in record.getMessage() and " 4" in record.getMessage() for record in caplog.records)


@pytest.fixture
def run(base, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    return tmp_path / "run"


FILES = ["metrics.jsonl", "starts.jsonl", "environment.json", "config.yaml"]


def test_damaged_files_block_no_command(run, molecules, empty_yaml, capsys):
    for name in FILES:
        data = (run / name).read_bytes()
        (run / name).write_bytes(b"\xffnull\n" + b"[" * 5000 + b"\n" + data)
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / "a.json").write_text('{"step": 1, "samples": [null]}')
    assert main(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 6 and found["starts"] == 1 and found["steps"] is None
    assert len(found["damaged"]) == 3 and all(name in "".join(found["damaged"]) for name in ("config", "starts"))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "metrics.jsonl" in page and "a.json" in page
    arguments = ["train", str(empty_yaml), f"run_dir={run}", f"data.path={molecules}", *TINY, "train.steps=8"]
    assert main(arguments) == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 9))
    assert "metrics.jsonl" in (run / "train.log").read_text()


def test_control_characters_of_a_log_do_not_reach_the_terminal(run, capsys):
    with (run / "train.log").open("a") as file:
        file.write("2026-01-01 00:00:00,000 WARNING \x1b]0;title\x07\n")
    assert main(["status", str(run)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def limit_files(size):
    """Limit the size of files, as a full disk does: EFBIG is an OSError like ENOSPC. Returns the limit before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return before


def test_lines_wait_while_the_disk_is_full_and_none_is_cut(tmp_path):
    file = LineFile(tmp_path / "f")
    assert file.write("a" * 60) is None
    before = limit_files(100)
    try:
        assert file.write("b" * 60) is not None and file.write("c") is not None
        assert file.waiting == 2 and (tmp_path / "f").read_text() == "a" * 60 + "\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.write("d") is None
    assert (tmp_path / "f").read_text().split() == ["a" * 60, "b" * 60, "c", "d"]
    assert file.close() is None and file.lost == 0


def test_a_full_device_loses_what_waits_at_the_end(tmp_path):
    (tmp_path / "log").symlink_to("/dev/full")
    file = LineFile(tmp_path / "log")
    assert all(file.write("x") for _ in range(3)) and file.close() and file.lost == 3


def log_line(text):
    return logging.LogRecord("scmdm", logging.INFO, "", 0, text, None, None)


def test_lines_of_the_log_that_are_lost_are_counted(tmp_path, caplog, monkeypatch):
    """When it is closed, and when there are more than can wait."""
    (tmp_path / "full").symlink_to("/dev/full")
    closed = LogFile(tmp_path / "full")
    for number in range(3):
        closed.emit(log_line(str(number)))
    closed.close()
    assert str(tmp_path / "full") in caplog.messages[-1] and "3 line" in caplog.messages[-1]
    monkeypatch.setattr(line_file, "_MOST_WAITING", 2)
    log = LogFile(tmp_path / "log")
    before = limit_files(0)
    try:
        for number in range(5):
            log.emit(log_line(str(number)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.emit(log_line("5"))
    assert "3 line" in caplog.messages[-1] and (tmp_path / "log").read_text().split() == ["3", "4", "5"]


@pytest.mark.parametrize("keep_going", [True, False])
def test_rows_that_cannot_be_written(tmp_path, caplog, keep_going):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, keep_going=keep_going)
    file.write(ROWS[0])
    before = limit_files(path.stat().st_size + 5)
    try:
        if not keep_going:
            with pytest.raises(UserError, match=r"metrics\.jsonl"):
                file.write(ROWS[1])
            return
        for row in ROWS[1:4]:
            file.write(row)
        assert read_metrics(path).rows == ROWS[:1] and len(caplog.records) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for row in ROWS[4:]:
        file.write(row)
    file.close()
    assert read_metrics(path).rows == ROWS and len(caplog.records) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=16m tmpfs '{place}' 2> /dev/null") != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield place
    os.system(f"umount '{place}'")


def rows_of(run):
    return len(read_metrics(run / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_disk_that_fills_up_and_has_room_again(molecules, empty_yaml, small_disk, policy):
    run, filler = small_disk / "run", small_disk / "filler"
    keys = ["train.steps=100000", "train.checkpoint_every=20", "train.keep_last=1", f"train.on_save_error={policy}"]
    process = scmdm("train", empty_yaml, f"run_dir={run}", f"data.path={molecules}", *TINY, *keys)
    wait_until(lambda: rows_of(run) > 20, process)
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    if policy == "stop":
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and errors.strip().count("\n") == 0 and errors.startswith("scmdm: error: ")
        return
    full = rows_of(run)
    time.sleep(3)
    assert process.poll() is None and rows_of(run) <= full + 100
    filler.unlink()
    wait_until(lambda: rows_of(run) > full + 100, process)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 85
    found = read_metrics(run / "metrics.jsonl")
    assert found.problem is None and [row["step"] for row in found] == list(range(1, len(found) + 1))
    log = (run / "train.log").read_text()
    assert sum("WARNING" in line and "metrics.jsonl" in line for line in log.splitlines()) == 2
    assert list_checkpoints(run / "checkpoints")


@pytest.mark.slow
def test_standard_output_on_a_full_disk_does_not_end_a_run(molecules, empty_yaml, tmp_path):
    with open("/dev/full", "w") as full:
        keys = [f"run_dir={tmp_path / 'run'}", f"data.path={molecules}", *TINY, "train.steps=3"]
        process = scmdm("train", empty_yaml, *keys, output=full)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == ""
    assert rows_of(tmp_path / "run") == 3
    assert logger.handlers == []
