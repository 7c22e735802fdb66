"""The causal mask that is opened over the first steps: its pairs, and a network that sees them."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from scmdm.config.layouts import LAYOUTS
from scmdm.diffusion.causal_annealing import CausalDenoiser, causally_annealed, visible_pairs
from scmdm.diffusion.packing import make_packing
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import State
from scmdm.models.decoder import Decoder
from scmdm.models.decoder_config import DecoderConfig
from tests.weights import load_weights

LENGTH, VOCAB = 24, 20
CPU = torch.device("cpu")
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()


def pairs(step, steps=10, seed=0, length=LENGTH):
    return visible_pairs(length, seed=seed, step=step, steps=steps, device=CPU)


def test_the_mask_opens_pair_by_pair():
    """Earlier keys are always visible, later ones with the probability of the step; in the end there is no mask."""
    length = 600  # more rows than are drawn at once
    later = ~torch.ones(length, length).tril().bool()
    for step in (0, 4, 8):
        visible = pairs(step, length=length)
        assert bool(visible[~later].all())
        assert float(visible[later].float().mean()) == pytest.approx((step + 1) / 10, abs=0.01)
    assert pairs(9) is None and pairs(10) is None and pairs(0, steps=0) is None and pairs(0, steps=1) is None


def test_pairs_depend_on_seed_and_step_alone():
    assert torch.equal(pairs(3), pairs(3))
    assert not torch.equal(pairs(3), pairs(4)) and not torch.equal(pairs(3), pairs(3, seed=1))
    assert torch.equal(pairs(3, length=LENGTH)[:8, :8], pairs(3, length=8))


def models():
    """Qwen3 with its causal mask, and ours with its weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    theirs = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, attn_implementation="eager")).eval()
    config = DecoderConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, norm_eps=1e-6, qk_norm=True)
    ours = Decoder(config, vocab_size=VOCAB, mask_id=VOCAB - 1, schedule=LogLinear())
    ours.rotary_emb.reset_parameters()
    weights = dict(theirs.named_parameters())
    names = LAYOUTS.load("qwen3").our_names(weights, config)
    load_weights(ours, {name: weights[published] for published, name in names.items()}, "qwen3")
    return ours.eval(), theirs


@torch.no_grad()
def logits(model, ids, visible=None, packing=None):
    hidden = model.hidden(State(ids, torch.ones(len(ids)).double(), packing=packing, visible_LL=visible))
    return model.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)[..., : VOCAB - 1]


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_with_the_causal_mask_alone_the_network_is_the_autoregressive_model(attention):
    ours, theirs = models()
    ours.config.attention = attention
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits[..., : VOCAB - 1]
    torch.testing.assert_close(logits(ours, ids, CAUSAL), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours, ids), expected, atol=1e-2)
    assert torch.equal(logits(ours, ids, torch.ones_like(CAUSAL)).argmax(-1), logits(ours, ids).argmax(-1))


def test_packed_documents_are_causal_each_for_itself():
    ours, _ = models()
    ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    packing = make_packing(torch.tensor([[0] * 10 + [1] * 14]))
    together = logits(ours, ids, CAUSAL, packing)
    alone = [logits(ours, part, CAUSAL[: part.shape[1], : part.shape[1]]) for part in ids.split((10, 14), dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_both_passes_and_shorter_batches_see_the_pairs_of_the_step():
    ours, _ = models()
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    annealed = causally_annealed(ours, ids, seed=0, step=3, steps=10)
    assert isinstance(annealed, CausalDenoiser)
    state = State(ids[:, :16], torch.ones(2).double())
    seen = replace(state, visible_LL=pairs(3)[:16, :16])
    assert torch.equal(annealed.estimate(state), ours.estimate(seen))
    weight = torch.ones(2, 16)
    assert torch.equal(
        annealed.weighted_nll(state, ids[:, :16], weight)[1], ours.weighted_nll(seen, ids[:, :16], weight)[1]
    )
    assert causally_annealed(ours, ids, seed=0, step=9, steps=10) is ours
