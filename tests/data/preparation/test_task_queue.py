"""Tasks shared by several workers, some of which die."""

import codecs
import dataclasses
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.text_files import TextFile
from scmdm.data.preparation import task_queue
from scmdm.data.preparation.duplicates import duplicates
from scmdm.data.preparation.records import cut_into_parts
from scmdm.data.preparation.task_queue import Task, Worker, run_tasks
from scmdm.errors import UserError
from scmdm.system.lease import LeaseHolder, acquire


def tasks(made, count=6, seconds=0.0):
    def run(number, directory):
        made.append(number)
        time.sleep(seconds)
        (directory / "result").write_text(str(number))

    return [Task(f"t-{number}", lambda directory, _, number=number: run(number, directory)) for number in range(count)]


def results(place, count=6):
    return [(place / f"t-{number}" / "result").read_text() for number in range(count)]


def ignore(_):
    pass


def test_a_worker_does_its_own_share_first_and_then_the_rest(tmp_path):
    made, heard = [], []
    run_tasks(tmp_path, tasks(made), Worker(1, 3), heard.append)
    assert made[:2] == [1, 4] and sorted(made) == list(range(6)) and heard == [1, 2, 3, 4, 5, 6]
    assert results(tmp_path) == list("012345")
    run_tasks(tmp_path, tasks(made), Worker(0, 3), ignore)
    assert len(made) == 6, "existing results are not made again"


def test_concurrent_workers_do_no_task_twice(tmp_path):
    made = []
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: run_tasks(tmp_path, tasks(made, seconds=0.1), Worker(i, 3), ignore), range(3)))
    assert sorted(made) == list(range(6)) and results(tmp_path) == list("012345")


def leave_lease(place, age_s=0.0, **changes):
    """Task t-0 is held by another worker."""
    lease = place / ".t-0.lease" / "00000001.json"
    lease.parent.mkdir()
    lease.write_text(json.dumps(dataclasses.asdict(LeaseHolder.current()) | changes))
    os.utime(lease, (time.time() - age_s,) * 2)


@pytest.mark.parametrize("where", ["dead here", "silent elsewhere"])
def test_the_lease_of_a_dead_worker_is_taken_over(tmp_path, where):
    if where == "dead here":
        leave_lease(tmp_path, pid=2**22 - 1)
    else:
        leave_lease(tmp_path, age_s=2 * task_queue._SILENCE_LIMIT_S, machine="another")
    run_tasks(tmp_path, tasks([]), Worker(), ignore)
    assert results(tmp_path) == list("012345")


def test_a_living_worker_elsewhere_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(task_queue, "_SILENCE_LIMIT_S", 1.0)
    leave_lease(tmp_path, machine="another")
    made, started = [], time.monotonic()
    run_tasks(tmp_path, tasks(made), Worker(), ignore)
    assert made[-1] == 0 and time.monotonic() - started > 0.5


def test_who_waits_asks_for_a_lease_only_when_it_may_be_free(tmp_path, monkeypatch):
    leave_lease(tmp_path, machine="another")
    lease, asked = tmp_path / ".t-0.lease" / "00000001.json", []
    released = json.dumps(json.loads(lease.read_text()) | {"released": True})

    def counted(directory, *given, **keys):
        asked.append(directory)
        return acquire(directory, *given, **keys)

    monkeypatch.setattr(task_queue, "acquire", counted)
    threading.Timer(1.0, os.utime, [lease]).start()  # renewed
    threading.Timer(2.5, lease.write_text, [released]).start()
    run_tasks(tmp_path, tasks([]), Worker(), ignore)
    assert results(tmp_path) == list("012345")
    assert asked.count(lease.parent) == 2, "at first, and after the release"


def test_a_worker_that_lost_its_lease_commits_nothing(tmp_path):
    """Another worker took the task over, as after a suspension, and has not finished yet."""
    waiting, done = threading.Event(), threading.Event()

    def run(directory, _):
        (directory / "result").write_text("first" if not waiting.is_set() else "second")
        if not waiting.is_set():
            waiting.set()
            leave_second(2)

    def leave_second(generation):
        lease = tmp_path / ".t.lease" / f"{generation:08d}.json"
        lease.write_text(json.dumps(dataclasses.asdict(LeaseHolder.current()) | {"pid": 2**22 - 1}))

    run_tasks(tmp_path, [Task("t", run)], Worker(), lambda count: done.set() if count else None)
    assert done.is_set() and (tmp_path / "t" / "result").read_text() == "second"


def test_a_task_that_fails_ends_the_work_and_leaves_no_result(tmp_path):
    def fail(directory, _):
        (directory / "half").write_text("")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        run_tasks(tmp_path, [Task("bad", fail)], Worker(), ignore)
    assert [path.name for path in tmp_path.iterdir()] == [".bad.lease"]


def test_a_worker_that_starts_after_the_end_returns(tmp_path):
    run_tasks(tmp_path / "gone", tasks([]), Worker(), ignore)
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


@given(
    st.lists(st.lists(st.text("a\r\n\ufeff\xe9", max_size=6), max_size=8), min_size=1, max_size=5), st.integers(1, 40)
)
def test_parts_together_are_the_files(tmp_path_factory, contents, part_bytes):
    place = tmp_path_factory.mktemp("files")
    files = {str(number): place / str(number) for number in range(len(contents))}
    for path, lines in zip(files.values(), contents, strict=True):
        path.write_bytes("\n".join(lines).encode())
    whole = [line for path in files.values() for _, line in TextFile(path).lines()]
    parts = cut_into_parts(files, part_bytes, divisible=lambda path: TextFile(path).is_divisible)
    pieces = [piece for part in parts for piece in part.slices]
    assert [line for piece in pieces for _, line in TextFile(files[piece.file]).lines(piece)] == whole
    contents = [path.read_bytes().removeprefix(codecs.BOM_UTF8) for path in files.values()]
    expected = [line.removeprefix(codecs.BOM_UTF8) for raw in contents for line in raw.splitlines()]
    assert [line.rstrip(b"\n") for line in whole] == expected
    for part in parts if all(TextFile(path).is_divisible for path in files.values()) else ():
        sizes = [(piece.end or files[piece.file].stat().st_size) - piece.start for piece in part.slices]
        assert sum(sizes) <= part_bytes
