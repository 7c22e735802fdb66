"""The decoder against LLaMA and Qwen2 of `transformers` without their causal mask."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig as TheirLlama
from transformers import LlamaForCausalLM, Qwen2ForCausalLM
from transformers import Qwen2Config as TheirQwen

from scmdm.config.layouts import LAYOUTS
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.packing import make_packing
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.models.conditioner import CONDITIONERS
from scmdm.models.decoder import Decoder
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.initialization import init_weights
from tests.weights import load_weights

MASK, VOCAB = 36, 37
TIME = torch.full((2,), 0.5).double()
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "attn_implementation": "eager",
}


def their_model(kind, tied, base, eps, **more):
    torch.manual_seed(0)
    options = {**SIZES, "tie_word_embeddings": tied, "rope_theta": base, "rms_norm_eps": eps, **more}
    model = LlamaForCausalLM(TheirLlama(**options)) if kind == "llama" else Qwen2ForCausalLM(TheirQwen(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def our_model(kind, tied, base, eps, **overrides):
    config = DecoderConfig(
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_width=88,
        rotary_base=base,
        norm_eps=eps,
        attention_bias=kind == "qwen2",
        tied=tied,
        **overrides,
    )
    model = Decoder(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
    init_weights(model, 0)
    return model


def loaded_model(kind, tied=False, base=10_000.0, eps=1e-6, shift=False, **overrides):
    """Ours with theirs' weights, and theirs."""
    theirs, ours = their_model(kind, tied, base, eps), our_model(kind, tied, base, eps, **overrides)
    ours.config.logit_shift = shift
    weights = dict(theirs.named_parameters())
    names = LAYOUTS.load(kind).our_names(weights, ours.config)
    load_weights(ours, {ours_: weights[name] for name, ours_ in names.items()}, kind, new_conditioner=True)
    return ours.eval(), theirs


def see_everything(length):
    return torch.zeros(1, 1, length, length)


@pytest.mark.parametrize(
    ("kind", "tied", "base", "eps"),
    [("llama", False, 10_000.0, 1e-6), ("llama", True, 500_000.0, 1e-5), ("qwen2", False, 1e6, 1e-6)],
)
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_logits_are_those_of_transformers(kind, tied, base, eps, attention):
    ours, theirs = loaded_model(kind, tied, base, eps, attention=attention)
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=see_everything(11)).logits
        causal = theirs(ids).logits
        found = ours.logits(ours.hidden(State(ids, TIME)).flatten(0, 1)).view(2, 11, VOCAB)
    assert not torch.allclose(expected, causal, atol=1e-2), "the causal mask was not off"
    real = torch.arange(VOCAB) != MASK
    torch.testing.assert_close(found[..., real], expected[..., real], rtol=1e-5, atol=1e-5)
    assert bool((found[..., MASK] == float("-inf")).all())


def test_heads_wider_than_width_over_heads():
    theirs = their_model("llama", False, 10_000.0, 1e-6, head_dim=12)
    ours = our_model("llama", False, 10_000.0, 1e-6, head_width=12).eval()
    assert ours.config.attention_width == 48 and ours.blocks[0].attn_k.weight.shape == (24, 32)
    weights = dict(theirs.named_parameters())
    names = LAYOUTS.load("llama").our_names(weights, ours.config)
    load_weights(ours, {name: weights[published] for published, name in names.items()}, "llama")
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=see_everything(11)).logits
        found = ours.logits(ours.hidden(State(ids, TIME)).flatten(0, 1)).view(2, 11, VOCAB)
    real = torch.arange(VOCAB) != MASK
    torch.testing.assert_close(found[..., real], expected[..., real], rtol=1e-5, atol=1e-5)


def test_shifted_logits_come_from_the_position_before():
    """As Dream writes it: the first position keeps its own, each other one has its predecessor's."""
    ours, theirs = loaded_model("qwen2", shift=True)
    ids = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        raw = theirs(ids, attention_mask=see_everything(7)).logits
        found = ours.logits(ours.hidden(State(ids, TIME)).flatten(0, 1)).view(2, 7, VOCAB)
    expected = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)
    real = torch.arange(VOCAB) != MASK
    torch.testing.assert_close(found[..., real], expected[..., real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_packed_documents_are_as_if_alone(shift):
    ours, _ = loaded_model("qwen2", shift=shift)
    lengths = (4, 1, 6)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    z = torch.randint(0, VOCAB, (1, 11), generator=torch.Generator().manual_seed(2))
    together = ours.hidden(State(z, TIME[:1], packing=make_packing(documents)))
    alone = [ours.hidden(State(part, TIME[:1])) for part in z.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONDITIONERS)
def test_adapted_model_equals_its_base_bitwise(kind, dtype):
    base, _ = loaded_model("qwen2", shift=True)
    adapted, _ = loaded_model("qwen2", shift=True, self_conditioned=True, conditioner=kind)
    z = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        expected = base.hidden(State(z, TIME))
        assert torch.equal(adapted.hidden(State(z, TIME, 10 * torch.randn(2, 16, 32))), expected)


def gradients(tied, recompute):
    model, _ = loaded_model("llama", tied, self_conditioned=True, activation_checkpointing=recompute, head_chunk=5)
    with torch.no_grad():
        model.conditioner.proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randint(0, MASK, (4, 16), generator=torch.Generator().manual_seed(1))
    draws = {"schedule": LogLinear(), "mask_id": MASK, "seed": 0, "step": 0, "rate": 1.0}
    batch = noise_batch(
        Sequences(x, torch.ones_like(x).bool(), torch.arange(4)), torch.full((4,), 0.5).double(), **draws
    )
    self_conditioned_nelbo(model.train(), batch, LogLinear(), condition=True).loss.backward()
    return model, batch, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_its_gradients_are_those_of_a_dense_head(tied):
    """The chunked head, of which an embedding may be the weight, against logits of all positions and autograd."""
    model, batch, found = gradients(tied, "none")
    estimate = model.estimate(State(batch.z, batch.t)).detach()
    model.zero_grad()
    weight, bias = model.head()
    assert bias is None and (weight is model.vocab_embed.embedding) == tied
    logits = model.hidden(State(batch.z, batch.t, estimate)) @ weight.T
    logits = logits.masked_fill(torch.arange(VOCAB) == MASK, float("-inf"))
    nll = -logits.log_softmax(-1).gather(2, batch.x[..., None]).squeeze(2)
    (2 * nll[batch.z == MASK].sum()).backward()  # w(0.5) = 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(recompute):
    plain, again = gradients(True, "none")[2], gradients(True, recompute)[2]
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_architecture_is_what_the_configuration_says():
    config = our_model("llama", False, 1e4, 1e-5).config
    assert (config.head_dim, config.kv_width, config.inner_width) == (8, 16, 88)
    wide = dataclasses.replace(config, kv_heads=None, mlp_width=None)
    assert (wide.kv_width, wide.inner_width) == (32, 128)
    assert dataclasses.replace(wide, head_width=6).attention_width == 24
