"""Against scipy where it has the same procedure, and by coverage in simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from scmdm.evaluation.significance import (
    Trainings,
    bootstrap,
    holm,
    paired_bootstrap,
    paired_proportions,
    proportion,
)


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


def test_the_bootstrap_is_scipys_basic_bootstrap():
    values = np.random.default_rng(0).exponential(size=80)
    ours = bootstrap(lambda at: float(values[at].mean()), len(values), resamples=4_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4_000, method="basic", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_same_seed_same_interval():
    values = np.arange(20.0)
    assert bootstrap(lambda at: values[at].std(), 20) == bootstrap(lambda at: values[at].std(), 20)


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


def perplexity(nll, count):
    return lambda at: float(np.exp(nll[at].sum() / count[at].sum()))


def texts(generator, n, mean):
    """Sums of log losses and numbers of tokens of n texts; all tokens of a text share part of their loss."""
    count = generator.integers(20, 60, n)
    return count * (mean + 0.3 * generator.standard_normal(n)), count


def test_bootstrap_intervals_of_perplexity_cover_the_truth():
    def one(generator):
        return np.exp(2.0), bootstrap(perplexity(*texts(generator, 150, 2.0)), 150, resamples=300)

    assert 0.9 <= coverage(300, one) <= 0.985


def test_a_paired_bootstrap_of_perplexity_covers_and_holds_its_level():
    def compared(generator, gap):
        nll, count = texts(generator, 150, 2.0)
        other = nll + count * (0.1 * generator.standard_normal(150) - gap)
        return paired_bootstrap(perplexity(nll, count), perplexity(other, count), 150, resamples=300)

    # E[exp] of the ratio estimator at the truth: both means are known, the tokens' numbers are independent of them.
    truth = np.exp(2.0) - np.exp(2.0 - 0.03)
    assert 0.9 <= coverage(300, lambda rng: (truth, compared(rng, 0.03))) <= 0.985
    claims = [compared(np.random.default_rng([5, trial]), 0.0).p_value < 0.05 for trial in range(300)]
    assert 0.01 <= np.mean(claims) <= 0.1


def jensen_shannon(counts_NK, reference_K):
    def metric(at):
        p = counts_NK[at].sum(0)
        p, q = p / p.sum(), reference_K / reference_K.sum()
        m = (p + q) / 2
        kl = [np.sum(x[x > 0] * np.log(x[x > 0] / m[x > 0])) for x in (p, q)]
        return float(np.sqrt(sum(kl) / 2))

    return metric


def test_a_paired_bootstrap_of_a_distance_of_histograms_holds_its_level():
    """Distances of finite samples are biased; their difference between two equal models is not."""
    reference = np.linspace(1, 3, 64)
    claims = []
    for trial in range(150):
        generator = np.random.default_rng([9, trial])
        both = [generator.multinomial(30, np.linspace(1, 2, 64) / np.linspace(1, 2, 64).sum(), size=120) for _ in "ab"]
        metrics = [jensen_shannon(counts, reference) for counts in both]
        claims.append(paired_bootstrap(*metrics, 120, resamples=200).p_value < 0.05)
    assert np.mean(claims) <= 0.12
