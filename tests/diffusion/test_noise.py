"""Keyed noise: known answers, independence of batch and order, range, uniformity."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scmdm.diffusion.noise import keyed_permutation, keyed_uniform, philox_4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors of the Random123 distribution."""
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20, unique=True), st.integers(0, 2**40), st.randoms())
def test_a_draw_belongs_to_its_sample(ids, seed, random):
    whole = keyed_uniform(seed, "mask", 3, torch.tensor(ids), 7)
    shuffled = list(range(len(ids)))
    random.shuffle(shuffled)
    again = keyed_uniform(seed, "mask", 3, torch.tensor([ids[i] for i in shuffled]), 7)
    assert torch.equal(again, whole[shuffled])
    assert torch.equal(keyed_uniform(seed, "mask", 3, torch.tensor(ids), 5), whole[:, :5])


def test_draws_differ_by_every_part_of_the_key():
    base = keyed_uniform(0, "mask", 0, torch.tensor([5]), 4)
    others = [
        keyed_uniform(1, "mask", 0, torch.tensor([5]), 4),
        keyed_uniform(0, "time", 0, torch.tensor([5]), 4),
        keyed_uniform(0, "mask", 1, torch.tensor([5]), 4),
        keyed_uniform(0, "mask", 0, torch.tensor([5 + 2**32]), 4),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_uniforms_are_uniform_and_open():
    u = keyed_uniform(0, "mask", 0, torch.arange(2000), 50)
    assert u.dtype == torch.float64
    assert u.min() > 0 and u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    # Neighbouring samples and neighbouring draws are uncorrelated.
    assert abs(np.corrcoef(u[:-1].flatten(), u[1:].flatten())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:, :-1].flatten(), u[:, 1:].flatten())[0, 1]) < 0.02


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30, unique=True), st.randoms())
def test_permutation_belongs_to_the_set_of_ids(ids, random):
    rank = keyed_permutation(0, "p", 0, torch.tensor(ids))
    assert sorted(rank.tolist()) == list(range(len(ids)))
    order = list(range(len(ids)))
    random.shuffle(order)
    assert torch.equal(keyed_permutation(0, "p", 0, torch.tensor([ids[i] for i in order])), rank[order])


@pytest.mark.gpu
def test_same_bits_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ids = torch.arange(100)
    assert torch.equal(keyed_uniform(0, "mask", 0, ids, 9), keyed_uniform(0, "mask", 0, ids.cuda(), 9).cpu())
