"""Attention of a model of blocks: FlexAttention against the dense mask, and windows against a cache."""

import shutil

import pytest
import torch

from scmdm.diffusion.blocks import both_copies, dense_mask, places_of
from scmdm.diffusion.key_value_cache import KeyValueCache, LayerCache, Window
from scmdm.diffusion.packing import make_packing
from scmdm.models import attention
from scmdm.models.attention import Masks, attend, masks_of_window
from scmdm.models.rotary import Rotary, attend_rotated

PACKED = torch.tensor([[0] * 50 + [1] * 46, [0] * 20 + [1] * 76])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def copies(length, size, packed):
    packing = make_packing(PACKED) if packed else None
    return both_copies(places_of(length, size, packing, torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "groups"), [(False, 2), (True, 1)])
def test_flex_attention_and_a_dense_mask_agree(packed, groups, monkeypatch):
    """Without its compiler: torch computes the same scores by plain operators."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    compare_with_dense(packed, groups)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_compiled_flex_attention_and_a_dense_mask_agree():
    compare_with_dense(packed=False, groups=2)


def compare_with_dense(packed, groups):
    places = copies(96, 16, packed)
    q, k, v = random(2, 192, 2, 16), random(2, 192, groups, 16, seed=1), random(2, 192, groups, 16, seed=2)
    with torch.no_grad():
        flex = attend(q, k, v, "auto", attention._flex_mask(places))
    torch.testing.assert_close(flex, attend(q, k, v, "sdpa", dense_mask(places, places)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("starts", [[0, 0], [6, 6], [4, 8]])
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_windows_are_parts_of_the_whole(starts, backend):
    """The same keys and values, whether they were computed at once or in windows that differ by sequence."""
    size, length, width = 4, 16, 6
    table = Rotary(8)(length)
    q, k, v = (random(2, length, 2, 8, seed=seed) for seed in range(3))
    whole = attend_rotated(
        q, k, v, table, backend, Masks(dense_mask(*[places_of(length, size, None, torch.device("cpu"))] * 2))
    )
    cache = KeyValueCache(2, length)
    first = Window(cache, torch.zeros(2, dtype=torch.int64), length, length, start=0)
    attend_rotated(q, k, v, table, backend, Masks(cache=LayerCache(first, 0)))
    cache._layers[0][0][:, max(starts) + width :] = torch.nan  # never seen
    for rows in (torch.tensor([0, 1]), torch.tensor([1])):
        start_B = torch.tensor(starts)[rows]
        window = Window(cache, start_B, width, int(start_B.max()) + width, rows)
        own = [window.cut(x[rows]) for x in (q, k, v)]
        masks = masks_of_window(window, size, None)._replace(cache=LayerCache(window, 0))
        found = attend_rotated(*own, table[window.columns_BW], backend, masks)
        visible = window.columns_BW // size * size + size <= window.end  # blocks that the window completes
        torch.testing.assert_close(found[visible], window.cut(whole[rows])[visible])
