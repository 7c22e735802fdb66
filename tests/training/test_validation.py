"""Likelihoods of shares: no number of ranks and no size of the batches changes times, masks or the result."""

import pytest
import torch

from scmdm.config.data import DataConfig, StreamConfig
from scmdm.config.training import TrainConfig
from scmdm.data.mixture import open_data
from scmdm.diffusion.likelihood import nelbo_of, nelbo_terms
from scmdm.diffusion.process import stratified_times
from scmdm.diffusion.schedule import LogLinear
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.training.validation import ValidationSet
from tests.data.sets import write_texts

CPU = torch.device("cpu")
SAMPLES = 300  # more than one stratum of one stream


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    sets = {name: write_texts(root / name, 1500, seed=seed) for seed, name in enumerate(("a", "b"))}
    return open_data(DataConfig(streams={name: StreamConfig(str(sets[name]), 1 + 9 * (name == "a")) for name in sets}))


def terms(data, part, parts, size, samples=SAMPLES, **options):
    manifest = data.manifest
    config = DiTConfig(width=16, layers=1, heads=2, condition_width=8, self_conditioned=True)
    model = DiT(config, vocab_size=manifest.vocab_size, mask_id=manifest.mask_id, schedule=LogLinear())
    init_weights(model, 0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    chosen = ValidationSet.of(data, "validation", samples, **options)
    batches = list(chosen.batches(CPU, size=size, part=part, parts=parts))
    found = nelbo_terms(
        model.eval(), batches, LogLinear(), mask_id=manifest.mask_id, seed=0, t_min=1e-3, strata=chosen.strata(),
        draws=2, condition=True
    )  # fmt: skip
    return found, [len(batch) for batch in batches], len(chosen)


@pytest.mark.parametrize("padding", [None, TrainConfig(padding="sample", pad_multiple=4)], ids=["length", "sample"])
def test_shares_and_batches_change_no_term(data, padding):
    whole, _, count = terms(data, 0, 1, 1000, padding=padding)
    assert len(whole) == count
    for parts, size in ((1, 32), (7, 16)):
        found = [terms(data, part, parts, size, padding=padding) for part in range(parts)]
        assert len({tuple(sizes) for _, sizes, _ in found}) == 1, "sharded ranks run the same passes"
        assert sum(found[0][1]) == -(-count // parts)
        assert max(found[0][1]) <= size
        joined = torch.cat([values for values, _, _ in found])[:count]
        torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)
        assert nelbo_of(joined).mean == pytest.approx(nelbo_of(whole).mean, rel=1e-6)
        assert nelbo_of(joined).stderr == pytest.approx(nelbo_of(whole).stderr, rel=1e-6)
        assert nelbo_of(joined).sequences == count


def test_ranks_beyond_the_last_sequence_repeat_it(data):
    whole, _, count = terms(data, 0, 1, 1000, 3)
    found = [terms(data, part, 5, 4, 3) for part in range(5)]
    assert [sizes for _, sizes, _ in found] == [[1]] * 5
    assert count < 5
    torch.testing.assert_close(torch.cat([values for values, _, _ in found])[:count], whole, rtol=1e-5, atol=1e-5)


def test_times_are_those_of_the_strata(data):
    chosen = ValidationSet.of(data, "validation", SAMPLES)
    strata = chosen.strata()
    ids = torch.cat([batch.ids for batch in chosen.batches(CPU, size=11)])
    assert torch.equal(torch.cat(strata), ids)
    assert len(set(ids.tolist())) == len(ids) == len(chosen)
    seen = []

    class Denoiser:
        def weighted_nll(self, state, x_BL, weight_BL):
            seen.append(state.t_B)
            return weight_BL.sum(), weight_BL

    batches = chosen.batches(CPU, size=11)
    nelbo_terms(Denoiser(), batches, LogLinear(), mask_id=data.manifest.mask_id, seed=0, t_min=1e-3, strata=strata)
    assert torch.equal(torch.cat(seen), torch.cat([stratified_times(0, 0, own, 1e-3) for own in strata]))
