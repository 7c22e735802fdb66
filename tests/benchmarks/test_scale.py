"""Counts of what each rank does: how they may behave as ranks are added."""

import hashlib

import pytest
import torch
import torch.distributed as dist

from benchmarks import counting, scale
from benchmarks.counting import MIB
from benchmarks.scale import CONSTANT, SHARE, Measurement, is_allowed, shape_of


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    root = tmp_path_factory.mktemp("scale")
    return root, scale.write_base(root)


@pytest.fixture(scope="module")
def adapted(small_base):
    """Counts of adaptations by number of ranks; evaluations count on what these have saved."""
    return {ranks: scale.count_adaptation(*small_base, ranks) for ranks in (1, 2, 4)}


def assert_allowed(rows, found):
    for row in rows:
        counts = {ranks: counted[row.name] for ranks, counted in found.items()}
        assert is_allowed(row, counts), (row.name, counts)


@pytest.mark.parametrize(
    ("counts", "base", "shape"),
    [
        ({1: 100, 2: 51, 8: 14}, 0, SHARE),
        ({1: 100, 8: 20}, 8, SHARE),
        ({1: 100, 8: 50}, 0, CONSTANT),
        ({1: 100, 8: 101}, 0, CONSTANT),
        ({1: 10, 8: 80}, 0, "x 8.0"),
        ({1: 0, 8: 0}, 0, CONSTANT),
    ],
)
def test_the_shape_of_counts(counts, base, shape):
    assert shape_of(counts, base) == shape
    assert is_allowed(Measurement("", CONSTANT, base=base), counts) == (shape in (CONSTANT, SHARE))
    assert is_allowed(Measurement("", SHARE, base=base), counts) == (shape == SHARE)


def test_hashed_bytes_are_counted_and_hashes_unchanged(tmp_path, monkeypatch):
    for name in ("sha256", "file_digest"):
        monkeypatch.setattr(hashlib, name, getattr(hashlib, name))
    expected = hashlib.sha256(b"abcdef").hexdigest()
    counted = counting.HashedBytes()
    digest = hashlib.sha256(b"abc")
    digest.update(memoryview(b"def"))
    assert digest.hexdigest() == expected and counted.count == 6
    (tmp_path / "file").write_bytes(b"abcdef")
    with open(tmp_path / "file", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == expected
    assert counted.count == 12


def test_collectives_are_counted():
    with counting.fake_ranks(4), counting.Collectives() as counted:
        dist.all_reduce(torch.ones(8))
        dist.all_gather_into_tensor(torch.empty(16), torch.ones(4))
    assert (counted.count, counted.bytes) == (2, 32 + 64)


def test_shares_of_many_ranks(tmp_path):
    scale._write_data(tmp_path / "data")
    assert_allowed(scale.SHARES, {ranks: scale.shares(tmp_path, ranks) for ranks in scale.SIMULATED})


def test_what_rank_0_gathers_costs_no_other_rank_more():
    found = {ranks: scale.gathered(ranks) for ranks in scale.SIMULATED[1:]}
    assert_allowed(scale.GATHERED, found)
    assert 0 < max(max(counted.values()) for counted in found.values()) < 300


@pytest.mark.slow
def test_simulated_ranks_and_machines():
    for rows, count, numbers in (
        (scale.SIMULATION, scale.simulate, (8, 64)),
        (scale.DOWNLOADS, scale.shards_read, (1, 8)),
    ):
        assert_allowed(rows, {number: count(number) for number in numbers})


@pytest.mark.slow
def test_machines_download_their_share(tmp_path):
    found = {machines: scale.count_downloads(tmp_path, machines) for machines in (1, 2, 8)}
    assert_allowed(scale.MACHINES, found)
    name, _ = (row.name for row in scale.MACHINES)
    assert found[1][name] > 100 and found[8][name] < 0.2 * found[1][name]


@pytest.mark.slow
@pytest.mark.long
def test_an_adaptation_is_divided_over_real_ranks(adapted):
    assert_allowed(scale.COUNTED, adapted)
    assert adapted[1]["validated sequences"] == 2 * scale._VALIDATED
    assert adapted[1]["hashed at the save"] > 150 * MIB and adapted[1]["hashed at opening"] > 40 * MIB
    # Seven units are gathered and reduced, six gathered again; everything else is one reduction.
    assert [counted["collectives of a step"] for counted in adapted.values()] == [1, 21, 21]
    assert {counted["sequences validated at once"] for counted in adapted.values()} == {scale._MICRO_BATCH}


@pytest.mark.slow
@pytest.mark.long
def test_an_evaluation_is_divided_over_real_ranks(small_base, adapted):
    """The checkpoint has one file of each rank; no rank opens all files."""
    found = {ranks: scale.count_evaluation(small_base[0], ranks) for ranks in adapted}
    assert_allowed(scale.EVALUATED, found)
    for ranks, counted in found.items():
        assert counted["samples drawn"] == scale._VALIDATED / ranks
        assert counted["evaluated sequences"] == 2 * scale._VALIDATED / ranks
    assert found[1]["shared weights of a rank"] > 40 * MIB


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--parts", "ranks,other"], "other"), (["--ranks", "1,a"], "'a'"), (["--ranks", "0"], "0")],
)
def test_parts_and_ranks_of_the_command(capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        scale.main(arguments)
    assert ended.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize(("counts", "status"), [({1: 8.0, 8: 1.0}, 0), ({1: 8.0, 8: 64.0}, 1)])
def test_a_count_that_grows_is_an_exit_status(tmp_path, monkeypatch, counts, status):
    monkeypatch.chdir(tmp_path)
    row = Measurement("a", SHARE)
    found = {ranks: {"a": count, "b": 1.0} for ranks, count in counts.items()}
    monkeypatch.setitem(
        scale.PARTS, "shares", lambda _root, _ranks: scale.report("a title", (row, Measurement("b", CONSTANT)), found)
    )
    assert scale.main(["--parts", "shares"]) == status


@pytest.mark.slow
@pytest.mark.long
def test_a_save_of_zero_sends_the_ends_of_rows(small_base):
    pytest.importorskip("deepspeed")
    found = {ranks: scale.count_zero(*small_base, ranks) for ranks in (2, 4)}
    assert_allowed(scale.ZERO, found)
    (name,) = {row.name for row in scale.ZERO}
    assert 0 <= max(counted[name] for counted in found.values()) < 0.02 * 160 * MIB
