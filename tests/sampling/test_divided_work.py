"""Division of work over ranks, and parts of results that outlive a killed job."""

import subprocess
import sys

import numpy as np
import pytest

from scmdm.errors import UserError
from scmdm.runtime.divided_work import _MOST_FILES, ResultParts, compute_divided, share_of
from scmdm.runtime.watchdog import HANG_EXIT, Watchdog, report_progress, watching_share
from scmdm.system.process_group import World


@pytest.mark.parametrize("items", [0, 1, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 100])
def test_shares_are_the_items_once_in_order_and_of_equal_size(items, size):
    shares = [share_of(range(items), rank, size) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(items))
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= 1


class Job:
    """Squares of numbers, in batches of three; is killed before the batch that holds `end`."""

    def __init__(self, end=None):
        self.end, self.computed = end, []

    def __call__(self, numbers):
        for start in range(0, len(numbers), 3):
            some = numbers[start : start + 3]
            if self.end in some:
                raise KeyboardInterrupt
            self.computed += some
            yield some, {"square": np.array([number**2 for number in some])}


def test_a_killed_job_goes_on_with_what_is_missing(tmp_path):
    parts = ResultParts.beside(tmp_path / "out.json", seed=3)
    with pytest.raises(KeyboardInterrupt):
        compute_divided(20, Job(end=10), parts)
    second = Job()
    found = compute_divided(20, second, parts)
    assert found["square"].tolist() == [number**2 for number in range(20)]
    assert second.computed == list(range(9, 20))
    third = Job()
    assert compute_divided(20, third, parts)["square"].tolist() == found["square"].tolist() and not third.computed
    parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_settings_are_not_used(tmp_path):
    parts = ResultParts.beside(tmp_path / "out.json", seed=3)
    compute_divided(6, Job(), parts)
    for other in (parts.of(condition=True), ResultParts.beside(tmp_path / "out.json", seed=4)):
        job = Job()
        compute_divided(6, job, other)
        assert job.computed == list(range(6))
    assert parts.of(a=1, b=2).prefix == parts.of(b=2, a=1).prefix


def test_what_was_being_written_is_absent_and_damage_is_named(tmp_path):
    parts = ResultParts.beside(tmp_path / "out.json", seed=3)
    parts.write([0, 2], {"square": np.array([0, 4])})
    (parts.directory / f".{parts.prefix}-000000001.npz.x.tmp").write_bytes(b"PK half of a file")
    job = Job()
    assert compute_divided(4, job, parts)["square"].tolist() == [0, 1, 4, 9]
    assert job.computed == [1, 3]
    (file, *_) = parts.directory.glob(f"{parts.prefix}-000000000.npz")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=file.name):
        compute_divided(4, Job(), parts)


def test_the_number_of_files_is_bounded(tmp_path):
    parts = ResultParts.beside(tmp_path / "out.json", seed=3)
    found = compute_divided(2000, Job(), parts)
    assert len(found["square"]) == 2000
    assert _MOST_FILES / 2 < len(list(parts.directory.iterdir())) <= _MOST_FILES


HANGS = """
import sys, time
from pathlib import Path
import numpy as np
from scmdm.runtime import watchdog
from scmdm.runtime.divided_work import ResultParts, compute_divided

watchdog._SHARE_MINUTES = 0.5 / 60  # PATIENCE times as long

def work(numbers):
    for number in numbers:
        time.sleep(0.7)  # four of these are longer than the limit
        if number == 4:
            time.sleep(600)
        yield [number], {"square": np.array([number**2])}

compute_divided(5, work, ResultParts.beside(Path(sys.argv[1]), seed=3))
"""


@pytest.mark.slow
def test_a_job_that_hangs_ends_with_its_stacks_and_goes_on_at_the_next_start(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANGS, tmp_path / "out.json"], capture_output=True, timeout=400)
    assert done.returncode == HANG_EXIT, done.stderr
    parts = ResultParts.beside(tmp_path / "out.json", seed=3)
    assert "in work" in (parts.directory / "stacks/rank_0.txt").read_text()
    job = Job()
    assert compute_divided(5, job, parts)["square"].tolist() == [0, 1, 4, 9, 16] and job.computed == [4]
    assert "in work" in (parts.directory / "stacks.before/rank_0.txt").read_text()
    assert not (parts.directory / "stacks").exists()


def test_every_result_is_progress(tmp_path, monkeypatch):
    beats, beat = [], Watchdog.beat
    monkeypatch.setattr(Watchdog, "beat", lambda self, part: beats.append(part) or beat(self, part))
    compute_divided(9, Job(), ResultParts.beside(tmp_path / "out.json", seed=3))
    assert beats == ["start", *["its share of the work"] * (1 + 9 // 3)]
    with watching_share(tmp_path, World(0, 1, 0)):
        pass
    before = len(beats)
    report_progress()
    assert len(beats) == before, "nothing is watched"
