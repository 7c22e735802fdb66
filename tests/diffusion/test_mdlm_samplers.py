"""MDLM's samplers against a plain implementation of its published code (arXiv 2406.07524), and ReMDM's (2503.00307).

The plain one decodes one sequence with the same uniforms, of the 24 bits that a float32 uniform has.
"""

import math

import pytest
import torch

from scmdm.config.sampling import SamplerConfig
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.token_draw import draw_tokens, draw_tokens_or_mask
from scmdm.errors import UserError
from tests.diffusion.oracle import Oracle
from tests.diffusion.test_published_samplers import MASK, SEED, Predictor, network, position_noise, token_noise
from tests.diffusion.test_sampler import chi_squared, draw, exact_distribution

LENGTH, EPS = 12, 1e-2  # with MDLM's 1e-5, hardly anything is left for the removal of noise
SHAPE = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "top_p_first": False, "top_p_rule": "reaching"}


def bits_24(uniform):
    return ((uniform * 2**24).floor() / 2**24).float()


def sample_categorical(probs, uniform):
    gumbel_norm = 1e-10 - (uniform + 1e-10).log()
    return (probs / gumbel_norm).argmax(dim=-1)


def nucleus(p, top_p, rule):
    """That of the codes of MDLM and ReMDM, or that of Duo's, which keeps the token that reaches `top_p`."""
    ordered, at = p.sort(descending=True, dim=-1)
    inside = ordered.cumsum(-1) <= top_p if rule == "within" else ordered.cumsum(-1) - ordered < top_p
    inside[..., 0] = True
    kept = ordered * inside
    return torch.zeros_like(p).scatter_(-1, at, kept / kept.sum(-1, keepdim=True))


def published(predict, sample_id, *, steps, predictor="ddpm", nucleus_p=1.0, rule="within", remask="never", eta=0.0):
    """Decode from masks alone; `remask` and `eta` are ReMDM's."""
    x = torch.full((LENGTH,), MASK)
    timesteps, dt = torch.linspace(1, EPS, steps + 1), (1 - EPS) / steps
    cached, sampled_again = None, 0
    for i in range(steps):
        t = timesteps[i]
        p = cached
        if p is None:
            p = predict(x.tolist()).log_softmax(1).float().exp()
            p = nucleus(p, nucleus_p, rule) if nucleus_p < 1 else p
        else:
            sampled_again += 1
        if predictor == "ddpm":
            move_t, move_s = (1 - torch.exp(torch.log1p(-(1 - 1e-3) * s)) for s in (t, t - dt))
        else:
            move_t, move_s = t, t - dt
        alpha_t, alpha_s = 1 - move_t, 1 - move_s
        largest = float(min(1, (1 - alpha_s) / alpha_t)) if alpha_t > 0 else 1.0
        sigma = {"never": 0.0, "cap": min(eta, largest), "rescale": eta * largest}[remask]
        q = p * ((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
        q[:, MASK] = (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)
        drawn = sample_categorical(q, bits_24(token_noise(sample_id, i, LENGTH)))
        remasked = position_noise("remask", sample_id, i, LENGTH) < sigma
        following = torch.where(x == MASK, drawn, torch.where(remasked, MASK, x))
        cached = p if predictor == "ddpm_cache" and torch.equal(following, x) else None
        x = following
    return torch.where(x == MASK, predict(x.tolist()).argmax(1), x).tolist(), sampled_again


def ours(model, ids, *, carry=False, **keys):
    config = SamplerConfig(kind="ancestral", eps=EPS, gumbel="float32", **keys)
    config.validate()
    given = torch.full((len(ids), LENGTH), MASK)
    options = {"schedule": LogLinear(1e-3), "settings": config.settings(carry), "mask_id": MASK, "seed": SEED}
    return sample(model, given, torch.tensor(ids), lengths_B=torch.full((len(ids),), LENGTH), **options)


CASES = {
    "ddpm": ({"steps": 9}, {"steps": 9}),
    "ddpm-cache": ({"steps": 40, "predictor": "ddpm_cache"}, {"steps": 40}),
    "nucleus": ({"steps": 9, "nucleus_p": 0.7}, {"steps": 9, "top_p": 0.7, "top_p_rule": "within"}),
    "nucleus-of-one": ({"steps": 9, "nucleus_p": 0.1}, {"steps": 9, "top_p": 0.1, "top_p_rule": "within"}),
    "nucleus-duo": ({"steps": 9, "nucleus_p": 0.7, "rule": "reaching"}, {"steps": 9, "top_p": 0.7}),
    "remdm-cap": ({"steps": 9, "remask": "cap", "eta": 0.3}, {"steps": 9, "remask": "cap", "remask_eta": 0.3}),
    "remdm-rescale": (
        {"steps": 9, "remask": "rescale", "eta": 0.4},
        {"steps": 9, "remask": "rescale", "remask_eta": 0.4},
    ),
}


# What a remasked position carries, the published code does not say.
@pytest.mark.parametrize(
    ("case", "carry"), [*((case, False) for case in CASES), *((case, True) for case in CASES if "remdm" not in case)]
)
def test_tokens_are_those_of_the_published_code(case, carry):
    theirs, keys = CASES[case]
    ids = list(range(8))
    found = ours(network(), ids, carry=carry, noise_removal="greedy", **keys)
    again = 0
    for row, evaluations, sample_id in zip(found.tokens.tolist(), found.evaluations_B.tolist(), ids, strict=True):
        predict = Predictor(network(), carry=carry, shift=False)
        # A cached prediction is that of another evaluation only without a carried estimate.
        options = theirs | ({"predictor": "ddpm"} if carry else {})
        tokens, cached = published(predict, sample_id, **options)
        assert row == tokens, sample_id
        assert predict.calls + cached - 1 <= evaluations <= predict.calls + cached
        again += cached
    assert (again > 0) == (case == "ddpm-cache" and not carry)


def test_the_cases_differ():
    found = [
        ours(network(), [0, 1, 2, 3], noise_removal="greedy", **keys).tokens.tolist() for _, keys in CASES.values()
    ]
    assert all(found.count(tokens) == 1 for tokens in found)


def rare_uniforms(rows, columns, seed=0):
    """Float32 uniforms of which many are near 0 or 1, where their bits end."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.exp2(24 * torch.rand(rows, columns, generator=generator, dtype=torch.float64)).long().clamp(1, 2**24 - 1)
    near_one = torch.rand(rows, columns, generator=generator) < 0.8
    return torch.where(near_one, 2**24 - k, k - 1).double() / 2**24


@pytest.mark.parametrize("reveal", [1e-4, 1e-3, 0.3, 1.0])
def test_one_draw_of_tokens_and_mask(reveal):
    rows, vocab = 4000, 40
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
    mask = 17
    logits[:, mask] = -math.inf
    uniform = rare_uniforms(rows, vocab)
    q = logits.double().softmax(1).mul(reveal)
    q[:, mask] = 1 - reveal
    expected = sample_categorical(q.float(), uniform.float())
    probability = torch.full((rows,), reveal, dtype=torch.float64)
    found = draw_tokens_or_mask(logits, uniform, probability, mask, **SHAPE)
    assert torch.equal(found, expected)
    masked = (found == mask).double().mean()
    assert (masked == 0) if reveal == 1 else (0.01 < masked < 0.999)


def test_tokens_alone_are_drawn_with_24_bits():
    rows, vocab = 4000, 40
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    uniform = torch.where(uniform > 0.9, 1 - (1 - uniform) * 2.0**-22, uniform)  # closer to 1 than a float32 can be
    found = draw_tokens(logits, uniform, gumbel="float32")
    assert torch.equal(found, sample_categorical(logits.double().softmax(1).float(), bits_24(uniform)))
    assert not torch.equal(found, draw_tokens(logits, uniform))


def test_float32_reveals_68_where_120_are_due():
    """At reveal probability 1e-3, among 17,600 equally probable tokens. Ten times as many positions are drawn.

    The race is between the mask and the first of the tokens, whose uniform is the largest of 17,600. A second column
    has the probability of the others, and a uniform of 0, with which it does not win.
    """
    positions, tokens, reveal = 1_200_000, 17_600, 1e-3
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(positions, dtype=torch.float64, generator=generator) ** (1 / tokens)
    uniform = torch.stack([largest, torch.zeros_like(largest), torch.rand(positions, generator=generator).double()], 1)
    logits = torch.tensor([[1 / tokens, 1 - 1 / tokens, 0.0]], dtype=torch.float64).log().expand(positions, -1)
    probability = torch.full((positions,), reveal, dtype=torch.float64)
    drawn = draw_tokens_or_mask(logits, uniform, probability, 2, **SHAPE)
    assert (drawn != 1).all()
    level = tokens / (reveal * 2**24)
    due, expected = positions * reveal, positions * reveal * level / math.expm1(level)
    assert round(due / 10) == 120 and round(expected / 10) == 68
    assert abs(int((drawn == 0).sum()) - expected) < 3 * expected**0.5
    exact = (1 - reveal) / -uniform[:, 2].clamp(min=2.0**-24).log() < reveal / tokens / -largest.log()
    assert abs(int(exact.sum()) - due) < 3 * due**0.5, "with all bits, as many as are due"


@pytest.mark.parametrize("removal", ["last_step", "draw", "greedy"])
@pytest.mark.parametrize("gumbel", ["float32", "float64"])
def test_every_masked_token_is_removed(removal, gumbel):
    oracle = Oracle()
    settings = SamplerSettings(steps=4, eps=0.2, noise_removal=removal, gumbel=gumbel)
    drawn = draw(oracle, settings, n=200)
    assert (drawn.tokens != oracle.mask_id).all()
    further = drawn.evaluations_B - 4
    assert set(further.tolist()) == ({0} if removal == "last_step" else {0, 1})
    assert removal == "last_step" or 0.3 < further.double().mean() < 0.7  # 1 - 0.8^3 of the sequences are not finished


SETTINGS = [
    SamplerSettings(steps=4),
    SamplerSettings(steps=4, block_length=2),
    SamplerSettings(steps=4, remask="rescale", remask_eta=0.4),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.block_length}-{s.remask}")
def test_the_race_has_the_exact_distribution_where_24_bits_suffice(settings):
    oracle = Oracle()
    raced = SamplerSettings(**{**vars(settings), "gumbel": "float32"})
    drawn = draw(oracle, raced)
    assert drawn.evaluations == settings.steps
    assert chi_squared(oracle, drawn.tokens, exact_distribution(oracle, LogLinear(), settings)) > 1e-3


def test_drawn_removal_of_noise_has_the_exact_distribution():
    """It is a step from eps to 0."""
    oracle, n = Oracle(), 20000
    drawn = draw(oracle, SamplerSettings(steps=1, eps=0.5, noise_removal="draw"), n=n)
    expected = exact_distribution(oracle, LogLinear(), SamplerSettings(steps=2))
    assert chi_squared(oracle, drawn.tokens, expected) > 1e-3


def test_a_raced_sample_does_not_depend_on_its_batch():
    together = ours(network(), [0, 1, 2], carry=True, noise_removal="greedy", steps=5)
    for number in range(3):
        alone = ours(network(), [number], carry=True, noise_removal="greedy", steps=5)
        assert torch.equal(alone.tokens[0], together.tokens[number])


def test_logits_are_computed_in_parts():
    class Parts(Oracle):
        largest = 0

        def logits(self, h_ND):
            self.largest = max(self.largest, len(h_ND))
            return super().logits(h_ND)

    oracle = Parts()
    draw(oracle, SamplerSettings(steps=2, gumbel="float32"), n=400)
    assert 0 < oracle.largest < 3 * 400


@pytest.mark.parametrize("kind", ["confidence", "random", "first_hitting"])
def test_other_kinds_draw_tokens_alone(kind):
    """Which positions they reveal does not depend on the precision; with so few tokens, nor do the tokens."""
    found = [
        draw(Oracle(), SamplerSettings(kind=kind, steps=3, gumbel=gumbel), n=500) for gumbel in ("float32", "float64")
    ]
    assert torch.equal(found[0].tokens, found[1].tokens)


@pytest.mark.parametrize(
    ("name", "value"), [("remask_eta", 0.1), ("remasked_estimate", "null"), ("top_p_rule", "within")]
)
def test_a_setting_without_effect_is_refused(name, value):
    with pytest.raises(UserError, match=rf"sampler\.{name}"):
        SamplerConfig(**{name: value}).validate()
    SamplerConfig(**{name: value}, remask="cap", top_p=0.9).validate()


@pytest.mark.parametrize(
    "keys", [{"kind": "confidence", "eps": 1e-3}, {"eps": 0.0}, {"eps": 1e-3, "block_length": 4}], ids=str
)
def test_removal_of_noise_that_would_be_ignored_is_refused(keys):
    with pytest.raises(UserError, match=r"sampler\.noise_removal"):
        SamplerConfig(noise_removal="greedy", **keys).validate()
