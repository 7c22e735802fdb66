"""Quality at equal diversity: interpolation, its error, and what is compared."""

import math

import numpy as np
import pytest
from scipy import stats

from scmdm.domains.sample_values import SampleValues
from scmdm.domains.text.domain import TextDomain
from scmdm.evaluation.frontier import Way, compare_at_equal_diversity, equal_diversity_table, interpolate

PERPLEXITY, ENTROPY = TextDomain.metrics[:2]
ARMS = [
    {"name": "base", "label": "base", "rate": 0.0},
    {"name": "base_cool", "label": "base, 0.8", "rate": 0.0, "samples_of": "base"},
    {"name": "scmdm", "label": "rate 1", "rate": 1.0},
    {"name": "scmdm_cool", "label": "rate 1, 0.8", "rate": 1.0, "samples_of": "scmdm"},
    {"name": "scmdm_warm", "label": "rate 1, 1.1", "rate": 1.0, "samples_of": "scmdm"},
]
# True mean entropy and mean negative log-likelihood, nats per token. At 3.10, rate 1 has 2.45: 0.15 less than the base.
TRUTH = {
    "base": (3.10, 2.60),
    "base_cool": (2.90, 2.20),
    "scmdm": (3.05, 2.40),
    "scmdm_cool": (2.85, 2.00),
    "scmdm_warm": (3.15, 2.50),
}


def row(arm, entropy_N, nll_N, steps=32, adaptation_seed=0, sampling_seed=0):
    values = {
        "perplexity": SampleValues.ratio(nll_N, np.ones(len(nll_N)), exponential=True),
        "entropy": SampleValues.mean(entropy_N),
    }
    return {
        "arm": arm,
        "steps": steps,
        "adaptation_seed": adaptation_seed,
        "sampling_seed": sampling_seed,
        "num": len(entropy_N),
        "metrics": {name: found.value() for name, found in values.items()},
        "values": values,
    }


def drawn(generator, n=200, shared=0.7, arms=tuple(TRUTH), **where):
    """Samples of each arm, whose noise is shared in part, with nll and entropy correlated."""
    common = generator.normal(size=(2, n))
    rows = []
    for arm in arms:
        own = generator.normal(size=(2, n))
        first, second = math.sqrt(shared) * common + math.sqrt(1 - shared) * own
        entropy, nll = TRUTH[arm]
        rows.append(row(arm, entropy + 0.1 * first, nll + 0.3 * (0.6 * first + 0.8 * second), **where))
    return rows


def compared(rows, arms=ARMS, reference=ARMS[2]):
    return compare_at_equal_diversity(rows, arms, reference, PERPLEXITY, ENTROPY)


def test_interpolation_is_linear_between_neighbours_and_never_outside():
    ways = [Way(3.0, 2.0), Way(1.0, 0.0), Way(2.0, 1.5)]
    assert interpolate(ways, Way(1.5, 9.0)).log_y == pytest.approx(0.75)
    assert interpolate(ways, Way(2.2, 9.0)).log_y == pytest.approx(1.6)
    assert interpolate(ways, Way(3.0, 9.0)).log_y == 2.0
    assert interpolate(ways, Way(3.0001, 9.0)) is None and interpolate(ways, Way(0.9, 9.0)) is None
    assert interpolate([Way(2.0, 1.0), Way(2.0, 3.0)], Way(2.0, 9.0)).log_y == 1.0
    assert interpolate([Way(2.0, 1.0)], Way(2.0, 9.0)) is None


def test_models_are_compared_at_the_diversity_of_either():
    exact = [row(arm, np.full(8, x), np.full(8, y)) for arm, (x, y) in TRUTH.items()]
    at_theirs, at_ours = compared(exact)
    assert (at_theirs.models, at_theirs.at, at_theirs.x) == (("rate 1", "base"), "base", pytest.approx(3.10))
    assert at_theirs.log_y == pytest.approx((2.45, 2.60)) and at_theirs.compared is None  # values do not vary
    assert (at_ours.at, at_ours.x) == ("rate 1", pytest.approx(3.05))
    assert at_ours.log_y == pytest.approx((2.40, 2.50))


def test_where_a_model_was_not_sampled_nothing_is_claimed():
    rows = drawn(np.random.default_rng(0), arms=[arm for arm in TRUTH if arm != "scmdm_warm"])
    outside, inside = compared(rows)
    assert outside.at == "base" and outside.log_y is None and outside.compared is None
    assert inside.at == "rate 1" and inside.compared is not None
    assert outside.reason
    _, lines = equal_diversity_table([outside, inside], PERPLEXITY, ENTROPY)
    assert lines[0][4:] == ["-", outside.reason, "-", "-", "-"]
    assert float(lines[1][7]) == pytest.approx(inside.compared.p_value, rel=0.1), "one comparison is tested"


def test_models_sampled_in_one_way_are_not_compared():
    assert compared(drawn(np.random.default_rng(0)), [ARMS[0], ARMS[2]]) == []
    only_ours = [arm for arm in TRUTH if arm != "base_cool"]
    found = compared(drawn(np.random.default_rng(0), arms=only_ours))
    assert [one.compared is None for one in found] == [False, True]


def test_another_sampler_is_not_a_way_to_sample_the_model():
    """Interpolated with it, rate 1 would seem to have been sampled at the base's diversity."""
    rows = drawn(np.random.default_rng(0))
    tempered = [{**arm, "sampler": ["temperature=1.1"]} if arm["name"] == "scmdm_warm" else arm for arm in ARMS]
    assert [one.compared is None for one in compared(rows, tempered)] == [False, False]
    skipping = [{**arm, "sampler": ["idle_steps=skip"]} if arm["name"] == "scmdm_warm" else arm for arm in ARMS]
    found = {(one.models, one.at): one.compared for one in compared(rows, skipping)}
    assert found[("rate 1", "base"), "base"] is None
    assert (("rate 1", "rate 1, 1.1"), "rate 1, 1.1") in found, "it is a model of its own"


def test_a_number_of_steps_at_which_only_one_model_was_sampled_is_left_out():
    rows = drawn(np.random.default_rng(0))
    for more in (["base_cool"], ["scmdm"], ["other"]):
        alone = [dict(rows[0], arm=arm, steps=64) for arm in more]
        arms = [*ARMS, {"name": "other", "label": "other", "rate": 0.0}]
        assert {one.steps for one in compared([*rows, *alone], arms)} == {32}


@pytest.mark.parametrize("perplexity", [0.0, -1.0])
def test_a_damaged_perplexity_is_an_error_that_the_reader_of_a_record_names(perplexity):
    first, *others = drawn(np.random.default_rng(0))
    with pytest.raises(ValueError, match="math domain error"):
        compared([{**first, "metrics": {"entropy": 3.0, "perplexity": perplexity}}, *others])


def test_the_error_is_that_of_scipys_bootstrap():
    rows = drawn(np.random.default_rng(1))
    parts = {r["arm"]: (r["values"]["entropy"].array, r["values"]["perplexity"].array[0]) for r in rows}
    names = ("scmdm", "scmdm_warm", "base")
    data = [part for name in names for part in parts[name]]

    def difference(x_low, y_low, x_high, y_high, x, y):
        low, high, at = x_low.mean(-1), x_high.mean(-1), x.mean(-1)
        share = (at - low) / (high - low)
        return (1 - share) * y_low.mean(-1) + share * y_high.mean(-1) - y.mean(-1)

    theirs = stats.bootstrap(data, difference, paired=True, n_resamples=4_000, rng=np.random.default_rng(0))
    found = compared(rows)[0].compared
    assert found.difference == pytest.approx(float(difference(*data)))
    error = (found.high - found.low) / 2 / stats.t.ppf(0.975, 199)
    assert error == pytest.approx(theirs.standard_error, rel=0.06)


def test_intervals_cover_the_true_difference():
    """95 % of 600 simulated studies, within four standard errors; the true differences are -0.15 and -0.10."""
    generator, hits = np.random.default_rng(0), np.zeros(2)
    for _ in range(600):
        found = [one.compared for one in compared(drawn(generator, 100))]
        hits += [one.low <= truth <= one.high for one, truth in zip(found, (-0.15, -0.10), strict=True)]
    assert (abs(hits / 600 - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 600)).all()


def test_trainings_that_the_three_arms_share_are_compared_and_the_base_goes_with_each():
    """A training that lacks one temperature is missing only where that temperature is used."""
    generator = np.random.default_rng(0)
    adapted = [arm for arm in TRUTH if not arm.startswith("base")]
    base = drawn(generator, arms=[arm for arm in TRUTH if arm.startswith("base")])
    seeds = [drawn(generator, arms=adapted, adaptation_seed=seed) for seed in (1, 2)]
    both, first = compared([*base, *seeds[0], *seeds[1]]), compared([*base, *seeds[0]])
    without_warm = [one for one in seeds[1] if one["arm"] != "scmdm_warm"]
    assert compared([*base, *seeds[0], *without_warm]) == [first[0], both[1]]
    assert [len(one.each) for one in (*first, *both)] == [0, 0, 2, 2]
    alone = [compared([*base, *own])[0] for own in seeds]
    assert both[0].each == pytest.approx([one.log_y[0] - one.log_y[1] for one in alone])
    means = [compared([*base, *own])[1].log_y[0] for own in seeds]
    assert both[1].log_y[0] == pytest.approx(math.log(np.exp(means).mean()))
    assert both[0].compared != first[0].compared


def test_two_sampling_seeds_are_two_strata():
    generator = np.random.default_rng(0)
    rows = [drawn(generator, sampling_seed=seed) for seed in (0, 1)]
    one, two = (compared(found)[0].compared for found in (rows[0], [*rows[0], *rows[1]]))
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(math.sqrt(0.5), rel=0.15)


def test_the_table_is_in_percent_and_counts_its_comparisons():
    header, lines = equal_diversity_table(compared(drawn(np.random.default_rng(0), 2_000)), PERPLEXITY, ENTROPY)
    assert len(lines) == 2 and all(len(line) == len(header) for line in lines)
    assert lines[0][:4] == ["32", "base", "base", lines[0][3]] and float(lines[0][3]) == pytest.approx(3.1, abs=0.02)
    assert [float(x) for x in lines[0][4].split(" and ")] == pytest.approx([3.05, 3.15], abs=0.02)
    assert float(lines[0][6].split()[0]) == pytest.approx(100 * math.expm1(-0.15), abs=1.5)
    assert all(float(line[7]) < 1e-4 for line in lines)


def test_without_a_common_training_the_reason_is_given():
    generator = np.random.default_rng(0)
    trained = [{**arm, "name": arm["name"].replace("base", "vanilla")} for arm in ARMS]
    trained = [
        {**arm, "samples_of": arm["samples_of"].replace("base", "vanilla")} if "samples_of" in arm else arm
        for arm in trained
    ]
    ours = drawn(generator, arms=[arm for arm in TRUTH if not arm.startswith("base")], adaptation_seed=1)
    theirs = drawn(generator, arms=[arm for arm in TRUTH if arm.startswith("base")], adaptation_seed=2)
    theirs = [{**one, "arm": one["arm"].replace("base", "vanilla")} for one in theirs]
    found = compared([*ours, *theirs], trained)
    assert len(found) == 2 and all(one.reason and one.log_y is None for one in found)
    _, lines = equal_diversity_table(found, PERPLEXITY, ENTROPY)
    assert all(line[3] == "-" for line in lines)
