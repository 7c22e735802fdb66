"""What intervals need of samples: groups, first occurrences, and distances of parts of a set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from scmdm.domains.sample_values import GROUPS, SampleValues, distinct_parts, first_occurrences, without_groups
from scmdm.domains.wasserstein import wasserstein_of_counts
from scmdm.evaluation.significance import deviations

NUMBERS = st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(NUMBERS, NUMBERS, st.randoms(use_true_random=False))
def test_weighted_distances_are_scipys(values, reference, dice):
    counts = np.array([dice.randint(0, 3) for _ in values])
    found = wasserstein_of_counts(np.array(values), np.array(reference))(counts)
    if counts.any():
        assert found == pytest.approx(wasserstein_distance(values, reference, u_weights=counts), abs=1e-12)
    else:
        assert np.isnan(found)


def test_each_sample_is_left_out_once():
    for samples in (1, 7, GROUPS, 3 * GROUPS + 1):
        left_out = 1 - np.array(list(without_groups(samples)))
        assert len(left_out) == min(GROUPS, samples) and left_out.sum(0).tolist() == [1] * samples
        assert np.ptp(left_out.sum(1)) <= 1


@given(st.lists(st.sampled_from("abc")))
def test_first_occurrences_are_the_distinct_items(items):
    first = first_occurrences(items)
    chosen = [item for item, ok in zip(items, first, strict=True) if ok]
    assert chosen == list(dict.fromkeys(items))


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=4), max_size=12))
def test_distinct_parts_sum_to_the_distinct_items_and_vary_as_the_jackknife(samples):
    parts = distinct_parts(samples)
    everything = {item for own in samples for item in own}
    assert len(parts) == len(samples) and parts.sum() == pytest.approx(len(everything))
    without = [len({item for other in samples[:i] + samples[i + 1 :] for item in other}) for i in range(len(samples))]
    lost = len(everything) - np.array(without)
    assert parts - parts.sum() / max(1, len(parts)) == pytest.approx(lost - lost.sum() / max(1, len(lost)))


def test_the_error_of_a_share_of_distinct_items_is_that_of_repeated_draws():
    """300 draws of 500 samples with four words of 2,000 each. Words new to the texts before would have 1.9 times it."""
    generator, shares, errors = np.random.default_rng(0), [], []
    chances = 1 / np.arange(1, 2_001)
    for _ in range(300):
        words = generator.choice(2_000, (500, 4), p=chances / chances.sum())
        values = SampleValues.ratio(distinct_parts(words.tolist()), np.full(500, 4.0))
        shares.append(values.value())
        errors.append(np.sqrt((deviations(values) ** 2).sum()))
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.25)
