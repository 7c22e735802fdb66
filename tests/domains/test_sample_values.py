"""What intervals need of samples: groups, first occurrences, and distances of parts of a set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from scmdm.domains.sample_values import GROUPS, first_occurrences, without_groups
from scmdm.domains.wasserstein import wasserstein_of_counts

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
