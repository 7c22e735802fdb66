"""Against scipy where it has the same procedure, and by coverage in simulation."""

import itertools

import numpy as np
import pytest
from scipy import sparse, stats

from scmdm.domains.jensen_shannon import JensenShannon
from scmdm.domains.sample_values import SampleValues
from scmdm.domains.wasserstein import wasserstein_of_counts
from scmdm.evaluation.significance import Trainings, compare, estimate, holm, paired_proportions, proportion


def test_a_proportion_has_wilsons_interval():
    found = proportion(43, 100)
    z = stats.norm.ppf(0.975)
    p, n = 0.43, 100
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (found.value, found.low, found.high) == pytest.approx((p, centre - half, centre + half))


def test_mcnemar_is_the_sign_test_on_discordant_pairs():
    first = np.array([True] * 30 + [False] * 10 + [True] * 40 + [False] * 20)
    second = np.array([False] * 30 + [True] * 10 + [True] * 40 + [False] * 20)
    found = paired_proportions(first, second)
    # By enumeration: as far from 20 of 40 as 30 is, or farther.
    tail = sum(stats.binom.pmf(k, 40, 0.5) for k in range(41) if abs(k - 20) >= 10)
    assert found.p_value == pytest.approx(tail)
    assert found.difference == pytest.approx(0.2) and found.low < 0.2 < found.high


def test_equal_models_do_not_differ():
    same = np.arange(50) % 2 == 0
    found = paired_proportions(same, same)
    assert found.p_value == 1 and found.low < 0 < found.high and found.difference == 0


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_what_is_not_paired_is_refused(shapes):
    with pytest.raises(ValueError, match="shapes"):
        paired_proportions(*(np.zeros(shape, bool) for shape in shapes))


def test_means_have_students_interval_and_the_paired_t_test():
    generator = np.random.default_rng(0)
    first, second = generator.exponential(size=(2, 80))
    ours, theirs = [[SampleValues.mean(first)]], [[SampleValues.mean(second)]]
    found, expected = estimate(first.mean(), ours), stats.ttest_1samp(first, 0).confidence_interval()
    assert (found.value, found.low, found.high) == pytest.approx((first.mean(), *expected))
    found, expected = compare(first.mean() - second.mean(), ours, theirs), stats.ttest_rel(first, second)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_shares_of_one_training_have_the_methods_of_proportions():
    first, second = np.random.default_rng(0).random((2, 4, 60)) < 0.4
    ours, theirs = ([[SampleValues.mean(draw) for draw in draws]] for draws in (first, second))
    assert estimate(0.0, ours) == proportion(int(first.sum()), 240)
    assert compare(0.0, ours, theirs) == paired_proportions(first.ravel(), second.ravel())


def test_trainings_are_averaged_sample_by_sample():
    """Values of the same noise are averaged over trainings: N pairs, not three times as many."""
    first, second = np.random.default_rng(0).random((2, 3, 60)) < np.array([0.6, 0.4])[:, None, None]
    ours, theirs = ([[SampleValues.mean(own)] for own in draws] for draws in (first, second))
    found = compare(first.mean() - second.mean(), ours, theirs)
    assert found.p_value == pytest.approx(stats.ttest_rel(first.mean(0), second.mean(0)).pvalue)
    against_one = compare(first.mean() - second[0].mean(), ours, theirs[:1])
    assert against_one.p_value == pytest.approx(stats.ttest_rel(first.mean(0), second[0]).pvalue)


def test_sampling_seeds_are_strata():
    draws = np.random.default_rng(0).normal(size=(3, 50)) + np.array([[0], [5], [9]])
    found = estimate(draws.mean(), [[SampleValues.mean(draw) for draw in draws]])
    error = np.sqrt(draws.var(1, ddof=1).sum() / 50) / 3
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 147) * error)


def test_a_ratio_and_its_jackknife_have_scipys_bootstrap_error():
    nll, count = texts(np.random.default_rng(0), 100, 2.0)

    def metric(a, b):
        return np.exp(a.sum(-1) / b.sum(-1))

    theirs = stats.bootstrap(
        (nll, count), metric, n_resamples=4_000, paired=True, vectorized=False, rng=np.random.default_rng(1)
    ).standard_error
    linear = SampleValues.ratio(nll, count, exponential=True)
    jackknife = SampleValues.jackknife(lambda counts_N: metric(counts_N * nll, counts_N * count), 100)
    value = linear.value()
    assert value == pytest.approx(metric(nll, count))
    for own, freedom, tolerance in ((linear, 99, 0.1), (jackknife, 99, 0.1)):
        found = estimate(value, [[own]])
        assert (found.high - value) / stats.t.ppf(0.975, freedom) == pytest.approx(theirs, rel=tolerance)


def test_a_sample_without_a_value_does_not_count():
    generator = np.random.default_rng(0)
    values = np.where(generator.random(400) < 0.5, generator.normal(size=400), np.nan)
    known = values[~np.isnan(values)]
    found = estimate(known.mean(), [[SampleValues.mean(values)]])
    assert SampleValues.mean(values).value() == pytest.approx(known.mean())
    assert found.high - found.value == pytest.approx(1.96 * known.std() / np.sqrt(len(known)), rel=0.03)


NOTHING = {
    "no values": ([], []),
    "one sample": ([[SampleValues.mean([1.0])]], [[SampleValues.mean([2.0])]]),
    "no variation": ([[SampleValues.mean([1.0] * 5)]], [[SampleValues.mean([2.0] * 5)]]),
    "other noise": ([[SampleValues.mean(np.arange(5.0))]], [[SampleValues.mean(np.arange(6.0))]]),
    "other kinds": ([[SampleValues.mean(np.arange(5.0))]], [[SampleValues("jackknife", np.arange(5.0))]]),
    "shares of other noise": ([[SampleValues.mean([True, False])]], [[SampleValues.mean([True])]]),
    "a group without which there is no metric": ([[SampleValues("jackknife", np.array([1.0, np.nan]))]],) * 2,
    "no weights": ([[SampleValues.ratio([0, 0], [0, 0])]],) * 2,
}


@pytest.mark.parametrize("values", NOTHING.values(), ids=NOTHING)
def test_nothing_is_claimed_without_pairs_that_vary(values):
    assert compare(1.0, *values) is None


def test_holm_by_definition():
    p = [0.01, 0.04, 0.03, 0.005]
    adjusted = holm(p)
    # A hypothesis is rejected at level a if its adjusted p value is below a: against the stepwise procedure.
    for level in (0.01, 0.02, 0.03, 0.05, 0.06, 0.1):
        rejected = set()
        for rank, index in enumerate(np.argsort(p)):
            if p[index] > level / (len(p) - rank):
                break
            rejected.add(int(index))
        assert {i for i, value in enumerate(adjusted) if value <= level + 1e-12} == rejected
    assert holm([]) == []


def test_trainings_that_agree():
    assert Trainings((0.1, 0.2, 0.3)).agree and not Trainings((0.1, -0.2)).agree and not Trainings((0.0, 1.0)).agree
    assert Trainings((1.0, 2.0)).mean == 1.5


def coverage(trials, interval):
    """How often `interval(generator)` contains the truth, which it returns beside it."""
    hits = 0
    for trial in range(trials):
        truth, found = interval(np.random.default_rng([7, trial]))
        hits += found.low <= truth <= found.high
    return hits / trials


def correlated(generator, n, p, q, shared):
    """Pairs of Bernoulli samples with means p and q; a part `shared` of them uses the same uniform number."""
    u, v = generator.random(n), generator.random(n)
    v = np.where(generator.random(n) < shared, u, v)
    return u < p, v < q


@pytest.mark.parametrize(("p", "q", "shared"), itertools.product([0.5], [0.5, 0.45], [0.0, 0.8]))
def test_intervals_of_paired_proportions_cover_the_truth(p, q, shared):
    found = coverage(600, lambda rng: (p - q, paired_proportions(*correlated(rng, 300, p, q, shared))))
    assert 0.92 <= found <= 0.985


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_mcnemar_claims_a_difference_of_equal_models_in_at_most_5_percent(shared):
    claims = [
        paired_proportions(*correlated(np.random.default_rng([3, trial]), 300, 0.5, 0.5, shared)).p_value < 0.05
        for trial in range(600)
    ]
    assert np.mean(claims) <= 0.07


def test_intervals_of_wilson_cover_the_truth():
    assert 0.92 <= coverage(600, lambda rng: (0.1, proportion(rng.binomial(200, 0.1), 200))) <= 0.98


@pytest.mark.parametrize("p", [0.985, 0.5])
def test_intervals_of_the_mean_of_several_shares_cover_the_truth_and_stay_below_1(p):
    def one(generator):
        found = estimate_of_shares(correlated(generator, 120, p, p, 0.5))
        assert 0 < found.low < found.value <= found.high <= 1
        return p, found

    assert 0.92 <= coverage(600, one) <= 0.99


def estimate_of_shares(shares):
    return estimate(float(np.mean(shares)), [[SampleValues.mean(share)] for share in shares])


@pytest.mark.parametrize(("parts", "limits"), [([5.0] * 30 + [4.0], (0, 1)), ([9.0] * 30 + [4.0], (1, 2))])
def test_only_a_part_of_a_whole_has_limits_between_0_and_1(parts, limits):
    draw = SampleValues.ratio(parts, [5.0] * 31)
    found = estimate(draw.value(), [[draw]])
    assert limits[0] < found.low < found.high < limits[1]


def texts(generator, n, mean):
    """Sums of log losses and numbers of tokens of n texts; all tokens of a text share part of their loss."""
    count = generator.integers(20, 60, n)
    return count * (mean + 0.3 * generator.standard_normal(n)), count


def test_intervals_of_perplexity_cover_the_truth():
    def one(generator):
        draw = SampleValues.ratio(*texts(generator, 150, 2.0), exponential=True)
        return np.exp(2.0), estimate(draw.value(), [[draw]])

    assert 0.92 <= coverage(600, one) <= 0.98


def test_a_paired_difference_of_perplexities_covers_and_holds_its_level():
    def compared(generator, gap):
        nll, count = texts(generator, 150, 2.0)
        other = nll + count * (0.1 * generator.standard_normal(150) - gap)
        both = [SampleValues.ratio(own, count, exponential=True) for own in (nll, other)]
        return compare(both[0].value() - both[1].value(), *([[draw]] for draw in both))

    truth = np.exp(2.0) - np.exp(2.0 - 0.03)
    assert 0.92 <= coverage(600, lambda rng: (truth, compared(rng, 0.03))) <= 0.98
    claims = [compared(np.random.default_rng([5, trial]), 0.0).p_value < 0.05 for trial in range(600)]
    assert 0.02 <= np.mean(claims) <= 0.08


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_jackknife_intervals_of_a_distance_cover_its_mean(shift):
    """The distance of 100 samples is biased; what is covered is the mean distance of 100 samples."""
    reference = np.random.default_rng(0).normal(size=500)
    found = []
    for trial in range(150):
        sample = np.random.default_rng([4, trial]).normal(shift, 1, 100)
        metric = wasserstein_of_counts(sample, reference)
        value = metric(np.ones(100))
        found.append(estimate(value, [[SampleValues.jackknife(metric, 100)]]))
    mean = np.mean([one.value for one in found])
    assert np.mean([one.low <= mean <= one.high for one in found]) >= 0.9


def test_a_difference_of_histogram_distances_holds_its_level():
    """Distances of finite samples are biased; their difference between two equal models is not."""
    reference, truth = np.linspace(1, 3, 64), np.linspace(1, 2, 64) / np.linspace(1, 2, 64).sum()
    claims = []
    for trial in range(60):
        generator = np.random.default_rng([9, trial])
        both = [sparse.csr_array(generator.multinomial(30, truth, size=120)) for _ in "ab"]
        metrics = [JensenShannon.of_counts(rows, reference, "distance") for rows in both]
        values = [[[SampleValues.jackknife(metric, 120)]] for metric in metrics]
        gap = metrics[0](np.ones(120)) - metrics[1](np.ones(120))
        claims.append(compare(gap, *values).p_value < 0.05)
    assert np.mean(claims) <= 0.12


def test_a_ratio_of_all_or_nothing_has_wilsons_interval():
    """As the share of unique molecules among the valid ones: 40 of 40 is not known to be all."""
    weights = np.repeat([1.0, 0.0], [40, 60])
    for share in (0.0, 1.0):
        found = estimate(share, [[SampleValues.ratio(share * weights, weights)]] * 2)
        limits = stats.binomtest(int(40 * share), 40).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((limits.low, limits.high))
    shared = np.full(100, 0.1)  # parts of ten distinct items that all samples share
    found = estimate(1.0, [[SampleValues.ratio(shared, shared)]])
    assert found.low == pytest.approx(stats.binomtest(10, 10).proportion_ci(method="wilson").low)
    nothing = estimate(0.0, [[SampleValues.ratio(np.zeros(4), np.zeros(4))]])
    assert np.isnan(nothing.low)
