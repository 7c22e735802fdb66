"""Tasks that several workers share: each done, whatever dies."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmdm.data.preparation import task_queue as work
from scmdm.data.preparation.duplicates import duplicates
from scmdm.data.preparation.records import Slice, cut_into_parts, read_lines
from scmdm.data.preparation.task_queue import Task, Worker, work_off
from scmdm.errors import UserError


def tasks(made, count=6, seconds=0.0):
    def run(number, directory):
        made.append(number)
        time.sleep(seconds)
        (directory / "result").write_text(str(number))

    return [Task(f"t-{number}", lambda directory, number=number: run(number, directory)) for number in range(count)]


def results(place, count=6):
    return [(place / f"t-{number}" / "result").read_text() for number in range(count)]


def ignore(_):
    pass


def test_one_worker_does_its_share_first_and_then_what_nobody_is_at(tmp_path):
    made, heard = [], []
    work_off(tmp_path, tasks(made), Worker(1, 3), heard.append)
    assert made[:2] == [1, 4] and sorted(made) == list(range(6)) and heard == [1, 2, 3, 4, 5, 6]
    assert results(tmp_path) == list("012345")
    work_off(tmp_path, tasks(made), Worker(0, 3), ignore)
    assert len(made) == 6, "what is there is not made again"


def test_workers_at_the_same_time_do_nothing_twice(tmp_path):
    made = []
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: work_off(tmp_path, tasks(made, seconds=0.1), Worker(i, 3), ignore), range(3)))
    assert sorted(made) == list(range(6)) and results(tmp_path) == list("012345")


@pytest.mark.parametrize("left", ["dead here", "silent elsewhere", "half written and silent"])
def test_the_claim_of_a_dead_worker_is_taken_over(tmp_path, left):
    claim = tmp_path / ".t-0.claim"
    host = "elsewhere" if left == "silent elsewhere" else socket.gethostname()
    claim.write_text("{" if "half" in left else json.dumps({"host": host, "pid": 2**22 - 1}))
    if "silent" in left:
        os.utime(claim, (time.time() - 2 * work._SILENT_S,) * 2)
    work_off(tmp_path, tasks([]), Worker(), ignore)
    assert results(tmp_path) == list("012345") and not claim.exists()


def test_a_living_worker_elsewhere_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_SILENT_S", 1.0)
    claim = tmp_path / ".t-0.claim"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    made, started = [], time.monotonic()
    work_off(tmp_path, tasks(made), Worker(), ignore)
    assert made[-1] == 0 and time.monotonic() - started > 0.5


def test_a_task_that_fails_ends_the_work_and_leaves_no_result(tmp_path):
    def fail(directory):
        (directory / "half").write_text("")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        work_off(tmp_path, [Task("bad", fail)], Worker(), ignore)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_comes_when_all_is_removed_goes(tmp_path):
    work_off(tmp_path / "gone", tasks([]), Worker(), ignore)
    assert not (tmp_path / "gone").exists()


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=5), st.integers(1, 40))
def test_repetitions_are_all_but_the_first(parts, at_once):
    hashes = [np.array([number << 59 for number in part], np.uint64) for part in parts]
    orders = [np.argsort(part, kind="stable") for part in hashes]
    found = [set() for _ in parts]
    for part, rows in duplicates([h[o] for h, o in zip(hashes, orders, strict=True)], orders, at_once):
        assert not found[part] & set(rows.tolist())
        found[part] |= set(rows.tolist())
    seen = set()
    for part, rows in zip(parts, found, strict=True):
        for row, number in enumerate(part):
            assert (row in rows) == (number % 32 in seen)
            seen.add(number % 32)


@given(st.lists(st.lists(st.binary(max_size=6), max_size=8), min_size=1, max_size=5), st.integers(1, 40))
def test_parts_together_are_the_files(tmp_path_factory, contents, part_bytes):
    place = tmp_path_factory.mktemp("files")
    files = {str(number): place / str(number) for number in range(len(contents))}
    for path, lines in zip(files.values(), contents, strict=True):
        path.write_bytes(b"\n".join(lines))
    whole = [line for path in files.values() for _, line in read_lines(path, Slice(path.name))]
    parts = cut_into_parts(files, part_bytes, divisible=lambda path: True)
    pieces = [piece for part in parts for piece in part.slices]
    assert [line for piece in pieces for _, line in read_lines(files[piece.file], piece)] == whole
    assert b"".join(whole) == b"".join(path.read_bytes() for path in files.values())
    for part in parts:
        sizes = [(piece.end or files[piece.file].stat().st_size) - piece.start for piece in part.slices]
        assert sum(sizes) <= part_bytes
