"""Start-up checks: each difference between ranks is reported once, with both values."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scmdm
from scmdm.config.loading import load_config
from scmdm.config.run import RunConfig
from scmdm.data.mixture import open_data
from scmdm.errors import UserError
from scmdm.models.network import count_parameters
from scmdm.runtime.preflight import (
    REMEDIES,
    DiskSpace,
    RankReport,
    _refuse_fatal,
    collect,
    compare,
    run_preflight,
    source_hashes,
)
from scmdm.system.process_group import World
from scmdm.training.setup import build_spec

MIB = 2**20
WORDS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
SAME = st.fixed_dictionaries({kind: st.dictionaries(WORDS, WORDS, max_size=4) for kind in REMEDIES})
FACTS = st.builds(RankReport, rank=st.integers(0, 99), host=WORDS, same=SAME, disks=st.just(()), clock=st.just(1e9))


@given(FACTS, st.integers(0, 99), WORDS)
def test_ranks_that_agree_have_no_problem(facts, rank, host):
    assert compare(facts, replace(facts, rank=rank, host=host)) == []


@given(FACTS, st.sampled_from(sorted(REMEDIES)), WORDS, WORDS, WORDS)
def test_a_difference_names_rank_host_key_and_both_values(facts, kind, key, here, there):
    ours, theirs = ({**facts.same, kind: {**facts.same[kind], key: value}} for value in (here, there))
    own, first = replace(facts, rank=7, host="node7", same=ours), replace(facts, rank=0, host="node0", same=theirs)
    problems = compare(first, own)
    assert len(problems) == (here != there)
    for problem in problems:
        expected = f"rank 7 on node7: {kind} {key} is {here}, but {there} on rank 0 on node0"
        assert problem.text.startswith(expected) and "\n" not in problem.text
        assert problem.fatal == (kind != "model of")


@given(FACTS, st.sampled_from(sorted(REMEDIES)), WORDS, WORDS)
def test_a_key_that_only_one_rank_has_is_a_difference_from_either_side(facts, kind, key, value):
    without = {**facts.same, kind: {k: v for k, v in facts.same[kind].items() if k != key}}
    more = replace(facts, same={**without, kind: {**without[kind], key: value}})
    less = replace(facts, same=without)
    for first, own in ((less, more), (more, less)):
        (problem,) = compare(first, own)
        assert "missing" in problem.text and value in problem.text


@given(FACTS, st.floats(-1e4, 1e4))
def test_clock_skew(facts, skew):
    problems = compare(facts, replace(facts, clock=facts.clock + skew))
    skew = facts.clock + skew - facts.clock
    assert len(problems) == (abs(skew) > 5)
    assert all(problem.fatal == (abs(skew) > 300) and f"({skew:+.1f} s)" in problem.text for problem in problems)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_space_below_needed_is_fatal_and_below_wanted_a_warning(free, needed, wanted):
    place = DiskSpace("run_dir", "/x", free * MIB, needed * MIB, wanted * MIB, "free space")
    problems = compare(facts := RankReport(0, "a", {}, (place,), 0.0), facts)
    assert [problem.fatal for problem in problems] == [free < needed] * (free < max(needed, wanted))
    for problem in problems:
        least = needed if free < needed else wanted
        assert f"run_dir=/x has {free} MiB free" in problem.text and f" {least} MiB; free space" in problem.text


def test_all_fatal_differences_are_reported_in_one_line():
    first, own = (RankReport(r, "a", {"key": {"seed": str(r), "threads": str(r)}}, (), 5.0 + 10 * r) for r in (0, 1))
    problems = compare(first, own)
    with pytest.raises(UserError, match=r"key seed is 1, but 0 on rank 0 on a; .* \(and 1 more\)$"):
        _refuse_fatal(problems)
    (warning,) = [problem for problem in problems if not problem.fatal]
    _refuse_fatal([warning])
    assert "clock" in warning.text


def test_changed_added_and_removed_source_files_are_found(tmp_path):
    for name in ("a.py", "sub/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = source_hashes(tmp_path)
    assert set(before) == {"a.py", "sub/b.py"}
    (tmp_path / "sub/b.py").write_text("x = 2\n")
    (tmp_path / "c.py").touch()
    after = source_hashes(tmp_path)
    assert after["a.py"] == before["a.py"] and after["sub/b.py"] != before["sub/b.py"] and "c.py" in after


@pytest.fixture
def given_run(molecules, tmp_path):
    config = load_config(RunConfig, None, [f"run_dir={tmp_path}", f"data.path={molecules}", "train.steps=3"])
    data = open_data(config.data)
    return config, data, build_spec(config, data.manifest, None), None, tmp_path, World(0, 1, 0), torch.device("cpu")


def test_the_report_of_this_process(given_run):
    facts = collect(*given_run)
    assert facts.same["version of"]["torch"] == torch.__version__
    assert set(facts.same["source file"]) == set(source_hashes(Path(scmdm.__file__).parent))
    assert facts.same["key"]["train.steps"] == "3" and "run_dir" not in facts.same["key"]
    elsewhere = replace(given_run[0], base="another path")
    assert collect(elsewhere, *given_run[1:]).same == facts.same, "the content of the base is compared, not its path"
    assert [disk.key for disk in facts.disks][:1] == ["run_dir"]
    assert facts.disks[0].needed > 16 * 1e6 * 0.9  # 1.4M parameters, four float32 of each


def test_frozen_weights_need_space_for_themselves_alone(given_run):
    """Without moments and averages; rank 4 adds a fiftieth."""
    config, data, spec, *rest = given_run
    model = replace(spec.model, self_conditioned=True, lora_rank=4)
    spec = replace(spec, model=model)
    needed = collect(replace(config, model=model), data, spec, *rest).disks[0].needed
    assert 1 < needed / (4 * count_parameters(spec.build())) < 1.5


def test_one_process_compares_nothing_and_leaves_no_file(given_run):
    started = run_preflight(*given_run)
    assert len(started.hosts) == 1 and started.skew_s == 0 and started.all_reduce_gb_per_s is None
    assert list(given_run[4].iterdir()) == []


def test_a_disk_too_small_for_one_checkpoint_is_refused(given_run, monkeypatch):
    """Only the amount of free space is simulated."""
    usage = shutil.disk_usage(given_run[4])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=MIB))
    with pytest.raises(UserError, match=r"run_dir=.* has 1 MiB free, but needs .* MiB; free space, lower train.keep"):
        run_preflight(*given_run)
