"""Samplers with the settings of published decoders against plain implementations of their rules, token for token.

The plain ones decode one sequence, without batches, padding or blocks of memory, and are written from the published
descriptions: LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487; DiffuCoder, 2506.20639, decodes in the same way) and
Fast-dLLM (arXiv 2505.22618). Both sides get the same random draws. Prompts of different lengths are decoded in one
batch by ours, with and without a carried estimate.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from scmdm.config.sampling import SamplerConfig
from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import State
from scmdm.diffusion.token_draw import count_by_factor, count_confident, shape_logits
from scmdm.errors import UserError
from scmdm.models.decoder import Decoder
from scmdm.models.decoder_config import DecoderConfig
from tests.diffusion.oracle import Oracle

VOCAB, MASK, EOS, EOT, PAD = 12, 11, 3, 4, 0
PROMPTS = [[5, 3, 8], [4], [9, 9, 7, 6, 3, 3, 5]]
SEED, STRIDE = 3, 2**20


@functools.cache
def network(*, shift=False):
    config = DecoderConfig(width=32, layers=2, heads=4, kv_heads=2, self_conditioned=True, logit_shift=shift)
    model = Decoder(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear()).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05 if "conditioner" in name else 0.35, generator=generator)
    model.rotary_emb.reset_parameters()
    return model


class Predictor:
    """Logits (L, V) of one sequence, given what the previous call predicted if `carry`; counts its calls."""

    def __init__(self, model, *, carry, shift):
        self.model, self.carry, self.shift = model, carry, shift
        self.h, self.calls = None, 0

    @torch.no_grad()
    def __call__(self, x):
        z = torch.tensor([x])
        estimate = None
        if self.carry and self.h is not None:
            estimate = self.model.carried(self.h, z)
        h = self.model.hidden(State(z, torch.ones(1), estimate))
        if self.shift:  # the published code shifts logits to the right, and repeats the first
            h = torch.cat([h[:, :1], h[:, :-1]], 1)
        self.h = h
        self.calls += 1
        return self.model.logits(h[0]).double()


def token_noise(sample_id, index, length):
    keys = sample_id * STRIDE + torch.arange(length)
    return keyed_uniform(SEED, "token", index, keys, VOCAB)


def position_noise(purpose, sample_id, index, length):
    return keyed_uniform(SEED, purpose, index, torch.tensor([sample_id]), length)[0]


def largest(scores, n):
    """Positions of the n largest scores, which is a dictionary by position."""
    return sorted(scores, key=lambda position: -scores[position])[:n]


# LLaDA and Fast-dLLM


def gumbel(logits, uniform, temperature):
    return logits if temperature == 0 else logits.exp() / (-uniform.log()) ** temperature


def transfer_counts(masked, steps):
    return [masked // steps + (step < masked % steps) for step in range(steps)]


def threshold_count(confidences, threshold):
    return max(1, sum(c >= threshold for c in confidences))


def factor_count(confidences, factor):
    ordered = sorted(confidences, reverse=True)
    for at, confidence in enumerate(ordered):
        if at > 0 and confidence < 1 - factor / (at + 2):
            break
    return at + 1 if at in (0, len(ordered) - 1) else at


def llada(predict, unconditional, prompt, sample_id, *, gen_length, block_length, steps=None, temperature=0.0,
          cfg_scale=0.0, remasking="low_confidence", logits_eos_inf=False, confidence_eos_eot_inf=False,
          threshold=None, factor=None):  # fmt: skip
    """Decode block after block behind the prompt."""
    x = [*prompt, *[MASK] * gen_length]
    blocks, index = gen_length // block_length, 0
    for block in range(blocks):
        start = len(prompt) + block * block_length
        counts = transfer_counts(block_length, steps // blocks) if steps else None
        step = 0
        while MASK in x[start : start + block_length] or (counts and step < len(counts)):
            logits = predict(x)
            if cfg_scale > 0:
                plain = unconditional([MASK] * len(prompt) + x[len(prompt) :])
                logits = plain + (cfg_scale + 1) * (logits - plain)
            logits[:, MASK] = -math.inf
            if logits_eos_inf:
                logits[:, EOS] = -math.inf
            x0 = gumbel(logits, token_noise(sample_id, index, len(x)), temperature).argmax(1)
            ranked = logits.clone()
            if confidence_eos_eot_inf:
                ranked[:, [EOS, EOT]] = -math.inf
            confidence = ranked.softmax(1).gather(1, x0[:, None])[:, 0]
            if remasking == "random":
                confidence = position_noise("order", sample_id, index, len(x))
            scores = {at: float(confidence[at]) for at in range(start, start + block_length) if x[at] == MASK}
            if threshold is not None:
                n = threshold_count(scores.values(), threshold)
            elif factor is not None:
                n = factor_count(scores.values(), factor)
            else:
                n = counts[step]
            for at in largest(scores, n):
                x[at] = int(x0[at])
            index += 1
            step += 1
    return x


# Dream and DiffuCoder


def truncated(logits, temperature, top_p, top_k):
    logits = logits / temperature if temperature > 0 else logits.clone()
    if top_p is not None and top_p < 1:
        ordered, at = logits.sort(dim=1, descending=True)
        beyond = ordered.softmax(1).cumsum(1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[:, :1]), beyond[:, :-1]], 1)
        for row in range(len(logits)):
            logits[row, at[row][beyond[row]]] = -math.inf
    if top_k is not None:
        logits[logits < logits.topk(top_k, dim=1).values[:, -1:]] = -math.inf
    return logits


def dream_confidence(alg, p, x0):
    if alg == "maskgit_plus":
        return p.gather(1, x0[:, None])[:, 0]
    if alg == "topk_margin":
        ordered = p.sort(dim=1, descending=True).values
        return ordered[:, 0] - ordered[:, 1]
    return (p * (p + 1e-10).log()).sum(1)


def dream(predict, _, prompt, sample_id, *, max_new_tokens, steps, alg, temperature=0.0, top_p=None, top_k=None,
          alg_temp=0.0, eps=1e-3):  # fmt: skip
    """Decode with as many tokens per step as the time steps from 1 to eps say."""
    x = [*prompt, *[MASK] * max_new_tokens]
    times = torch.linspace(1, eps, steps + 1)
    for index in range(steps):
        masked = [at for at, token in enumerate(x) if token == MASK]
        logits = predict(x)
        logits[:, MASK] = -math.inf
        shaped = truncated(logits, temperature, top_p, top_k)
        x0 = gumbel(shaped, token_noise(sample_id, index, len(x)), 1.0 if temperature else 0.0).argmax(1)
        t, s, last = times[index], times[index + 1], index == steps - 1
        if alg == "origin":
            u = position_noise("reveal", sample_id, index, len(x))
            chosen = [at for at in masked if last or u[at] < 1 - s / t]
        else:
            confidence = dream_confidence(alg, shaped.softmax(1), x0)
            n = len(masked) if last else int(torch.tensor(float(len(masked))) * (1 - s / t))
            if alg_temp:  # a draw without replacement: the race of exponentials
                probability = (confidence[masked] / alg_temp).softmax(0)
                race = -position_noise("order", sample_id, index, len(x)).log()
                scores = {at: float(p / race[at]) for at, p in zip(masked, probability, strict=True)}
            else:
                scores = {at: float(confidence[at]) for at in masked}
            chosen = largest(scores, n)
        for at in chosen:
            x[at] = int(x0[at])
    return x


LLADA = {"kind": "confidence", "transfer": "even", "block_start": "prompt", "temperature": 0.0}
FAST = {"kind": "confidence", "block_start": "prompt", "temperature": 0.0}
DREAM = {"eps": 1e-3, "temperature": 0.0}
RANKED = {**DREAM, "transfer": "ratio", "tempered_order": True, "top_p_first": True}
NAMES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
CASES = {  # their arguments, our keys
    "llada": ({"gen_length": 12, "block_length": 12, "steps": 12}, {**LLADA}),
    "llada-blocks": ({"gen_length": 12, "block_length": 4, "steps": 6}, {**LLADA}),
    "llada-uneven": ({"gen_length": 12, "block_length": 6, "steps": 8}, {**LLADA}),
    "llada-many-steps": ({"gen_length": 6, "block_length": 3, "steps": 10}, {**LLADA}),
    "llada-temperature": (
        {"gen_length": 12, "block_length": 6, "steps": 8, "temperature": 0.7},
        {**LLADA, "temperature": 0.7},
    ),
    "llada-random": (
        {"gen_length": 12, "block_length": 6, "steps": 8, "temperature": 1.0, "remasking": "random"},
        {**LLADA, "temperature": 1.0, "kind": "random"},
    ),
    "llada-cfg": (
        {"gen_length": 12, "block_length": 4, "steps": 6, "cfg_scale": 1.5},
        {**LLADA, "guidance": 2.5, "guided_by": "prompt"},
    ),
    "llada-cfg-temperature": (
        {"gen_length": 12, "block_length": 4, "steps": 6, "cfg_scale": 0.5, "temperature": 1.0},
        {**LLADA, "guidance": 1.5, "guided_by": "prompt", "temperature": 1.0},
    ),
    "llada-logits-eos": (
        {"gen_length": 12, "block_length": 12, "steps": 12, "logits_eos_inf": True},
        {**LLADA, "logits_eos_inf": True},
    ),
    "llada-confidence-eos-eot": (
        {"gen_length": 12, "block_length": 12, "steps": 12, "confidence_eos_eot_inf": True},
        {**LLADA, "confidence_eos_eot_inf": True},
    ),
    "fast-threshold": ({"gen_length": 12, "block_length": 6, "threshold": 0.6}, {**FAST, "threshold": 0.6}),
    "fast-threshold-temperature": (
        {"gen_length": 12, "block_length": 6, "threshold": 0.4, "temperature": 0.5},
        {**FAST, "threshold": 0.4, "temperature": 0.5},
    ),
    "fast-factor": ({"gen_length": 12, "block_length": 6, "factor": 1.0}, {**FAST, "factor": 1.0}),
    "fast-factor-large": ({"gen_length": 12, "block_length": 12, "factor": 2.0}, {**FAST, "factor": 2.0}),
    "dream-origin": (
        {"max_new_tokens": 12, "steps": 7, "alg": "origin", "temperature": 0.4},
        {**DREAM, "kind": "ancestral", "temperature": 0.4},
    ),
    **{
        f"dream-{alg}-{name}": (
            {"max_new_tokens": 12, "steps": 7, "alg": alg, **theirs},
            {**RANKED, "kind": NAMES[alg], **theirs},
        )
        for alg in NAMES
        for name, theirs in {
            "greedy": {},
            "nucleus-greedy": {"top_p": 0.8},
            "tempered": {"temperature": 0.4, "top_p": 0.95},
            "alg-temp": {"temperature": 0.7, "alg_temp": 0.3},
            "top-k": {"temperature": 0.9, "top_k": 3},
            "top-k-and-top-p": {"temperature": 0.9, "top_k": 4, "top_p": 0.7},
        }.items()
    },
    "dream-one-token-a-step": (
        {"max_new_tokens": 12, "steps": 12, "alg": "entropy", "temperature": 0.2, "top_p": 0.95},
        {**RANKED, "kind": "entropy", "temperature": 0.2, "top_p": 0.95},
    ),
}


def ours(model, theirs, keys, prompts, *, carry, ids=None):
    """Decode all prompts in one batch."""
    config = SamplerConfig(
        **keys, steps=theirs.get("steps") or 1, block_length=theirs.get("block_length"), end_tokens=[]
    )
    config.validate()
    settings = replace(config.settings(carry, (EOS, EOT)), carry=carry)
    generated = theirs.get("gen_length") or theirs["max_new_tokens"]
    lengths = torch.tensor([len(prompt) + generated for prompt in prompts])
    given = torch.full((len(prompts), int(lengths.max())), PAD)
    for row, prompt, length in zip(given, prompts, lengths, strict=True):
        row[:length] = torch.tensor([*prompt, *[MASK] * generated])
    drawn = sample(
        model,
        given,
        torch.arange(len(prompts)) if ids is None else ids,
        schedule=LogLinear(),
        settings=settings,
        mask_id=MASK,
        seed=SEED,
        lengths_B=lengths,
    )
    rows = [row[:length].tolist() for row, length in zip(drawn.tokens, lengths, strict=True)]
    return rows, drawn.evaluations_B.tolist()


@pytest.mark.parametrize("carry", [False, True], ids=["plain", "carried"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_published_rule(case, carry):
    theirs, keys = CASES[case]
    shift, rule = (True, dream) if case.startswith("dream") else (False, llada)
    unshifted, model = network(), network(shift=shift)
    found, evaluations = ours(model, theirs, keys, PROMPTS, carry=carry)
    for number, prompt in enumerate(PROMPTS):
        predict, plain = (Predictor(unshifted, carry=carry, shift=shift) for _ in range(2))
        assert found[number] == rule(predict, plain, prompt, number, **theirs), f"prompt {number}"
        assert evaluations[number] == predict.calls + plain.calls


BESIDE = {
    **{name: CASES[name] for name in ("llada-cfg-temperature", "llada-random", "fast-threshold-temperature")},
    # Blocks from the start of each sequence: the prompts fill different ones, and the sequences have 4 to 5.
    "sequence-blocks": ({"gen_length": 12, "block_length": 4, "steps": 9}, {"kind": "margin"}),
    "remasking": ({"gen_length": 12, "block_length": 4, "steps": 9}, {"remask": "rescale", "remask_eta": 0.5}),
    "first-hitting": ({"gen_length": 5}, {"kind": "first_hitting"}),
}


@pytest.mark.parametrize("carry", [False, True], ids=["plain", "carried"])
@pytest.mark.parametrize("case", BESIDE)
def test_a_sample_does_not_depend_on_the_prompts_beside_it(case, carry):
    theirs, keys = BESIDE[case]
    together, counts = ours(network(), theirs, keys, PROMPTS, carry=carry)
    for number, prompt in enumerate(PROMPTS):
        alone, count = ours(network(), theirs, keys, [prompt], carry=carry, ids=torch.tensor([number]))
        assert (alone[0], count[0]) == (together[number], counts[number])


def test_padding_is_not_seen():
    """A sequence that is decoded beside a longer prompt has the same tokens; its padding has no effect."""
    _, keys = CASES["llada-temperature"]
    lengths = torch.tensor([8, 5])
    drawn = []
    for pad in (PAD, 7):
        given = torch.full((2, 8), MASK)
        given[1, 5:] = pad
        settings = SamplerConfig(**keys, steps=8, block_length=4).settings(True)
        options = {"schedule": LogLinear(), "settings": settings, "mask_id": MASK, "seed": SEED, "lengths_B": lengths}
        drawn.append(sample(network(), given, torch.arange(2), **options).tokens)
        assert (drawn[-1][1, 5:] == pad).all()
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1, :5], drawn[1][1, :5])


def test_the_cases_differ():
    """Or a setting could be ignored, and its test still pass."""
    found = {}
    for case, (theirs, keys) in CASES.items():
        shift = case.startswith("dream")
        found[case] = ours(network(shift=shift), theirs, keys, PROMPTS[:2], carry=False)
    plain = {name: result for name, result in found.items() if name.startswith(("llada", "fast"))}
    for first in plain:
        for second in plain:
            assert first == second or plain[first] != plain[second], (first, second)
    for alg in NAMES:
        own = [found[f"dream-{alg}-{name}"] for name in ("greedy", "tempered", "alg-temp")]
        assert own[0] != own[1] != own[2] != own[0]


def test_the_order_of_truncations_matters():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = {}
    for first in (False, True):
        shaped = shape_logits(logits, 0.0, 3, 0.75, first, "reaching")
        kept[first] = int(shaped.isfinite().sum())
    assert kept == {False: 2, True: 3}


def test_carrying_changes_samples_and_costs_no_evaluation():
    for case in ("llada-blocks", "llada-cfg", "dream-entropy-greedy"):
        theirs, keys = CASES[case]
        plain, carried = (ours(network(), theirs, keys, PROMPTS, carry=carry) for carry in (False, True))
        assert plain[0] != carried[0] and plain[1] == carried[1]


def test_end_tokens_come_never_or_last():
    theirs, keys = CASES["llada"]
    drawn = {}
    for name, given in {"free": keys, "never": {**keys, "logits_eos_inf": True}}.items():
        rows, _ = ours(network(), theirs, given, PROMPTS, carry=False)
        drawn[name] = [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]
    assert any(EOS in row for row in drawn["free"]) and any(EOT in row for row in drawn["free"])
    assert not any(EOS in row for row in drawn["never"]) and any(EOT in row for row in drawn["never"])
    oracle, states = Oracle(), []  # of three tokens, of which the first is the end
    settings = SamplerSettings(kind="confidence", steps=3, transfer="even", temperature=0.0, late_ids=(0,))
    oracle.joint = torch.zeros(27, dtype=torch.float64).index_fill(0, torch.tensor([1, 2]), 0.5)  # 001 and 002
    options = {"schedule": LogLinear(), "settings": settings, "mask_id": oracle.mask_id, "seed": 0}
    start = torch.full((1, 3), oracle.mask_id)
    sample(oracle, start, torch.arange(1), **options, on_step=lambda seen: states.append(seen.z_BL[0].tolist()))
    assert states[0][:2] == [oracle.mask_id] * 2 and states[0][2] in (1, 2)


def test_counts_of_confident_tokens_by_hand():
    score = torch.tensor([[0.95, 0.2, 0.91, 0.9], [0.1, 0.2, 0.3, 0.99], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    candidates = torch.tensor([[True] * 4, [True, True, True, False], [False] * 4])
    assert count_confident(score, candidates, 0.9).tolist() == [3, 1, 0]
    # 1 - factor / (n + 1) is 2/3, 3/4, 4/5 for n = 2, 3, 4: the row fails at its last, which is then revealed, too.
    assert count_by_factor(score, candidates, 1.0).tolist() == [4, 1, 0]
    assert count_by_factor(score[:1], candidates[:1], 0.27).tolist() == [2]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_factor_rule_against_its_loop(n):
    scores = torch.rand(200, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    everything = torch.ones_like(scores, dtype=torch.bool)
    for factor in (0.3, 1.0, 1.7):
        expected = [factor_count(row, factor) for row in scores.tolist()]
        assert count_by_factor(scores, everything, factor).tolist() == expected


@pytest.mark.parametrize("rule", ["even", "ratio"])
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_every_transfer_rule_fills_the_sequence(rule, steps):
    oracle = Oracle(length=5)
    settings = SamplerSettings(kind="random", steps=steps, transfer=rule, eps=1e-3)
    given = torch.full((8, 5), oracle.mask_id)
    given[4:, 1] = 0
    options = {"schedule": LogLinear(), "settings": settings, "mask_id": oracle.mask_id, "seed": 0}
    drawn = sample(oracle, given, torch.arange(8), **options)
    assert drawn.evaluations == steps and (drawn.tokens != oracle.mask_id).all()
    assert (drawn.tokens[4:, 1] == 0).all()


def test_random_order_with_as_many_steps_as_tokens_is_exact():
    """One token at a time, in a random order: the joint distribution of the oracle."""
    oracle, n = Oracle(), 5_000
    settings = SamplerSettings(kind="random", steps=3, transfer="even", block_length=2)
    options = {"schedule": LogLinear(), "settings": settings, "mask_id": oracle.mask_id, "seed": 0}
    with pytest.raises(ValueError, match="1 steps for 2 blocks"):
        sample(
            oracle,
            torch.full((1, 3), oracle.mask_id),
            torch.arange(1),
            **options | {"settings": replace(settings, steps=1)},
        )
    tokens = sample(oracle, torch.full((n, 3), oracle.mask_id), torch.arange(n), **options).tokens
    powers = oracle.tokens ** torch.arange(2, -1, -1)
    counts = torch.bincount((tokens * powers).sum(1), minlength=len(oracle.joint))
    assert stats.chisquare(counts.numpy(), (oracle.joint * n).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"transfer": "even"}, "sampler.transfer"),
        ({"threshold": 0.9}, "sampler.threshold"),
        ({"kind": "entropy", "threshold": 0.9}, "sampler.threshold"),
        ({"kind": "margin", "factor": 1.0}, "sampler.factor"),
        ({"kind": "confidence", "factor": 1.0, "threshold": 0.9}, "sampler.factor"),
        ({"kind": "confidence", "factor": 1.0, "eps": 1e-3}, "sampler.eps"),
        ({"kind": "confidence", "threshold": 0.9, "alg_temp": 1.0}, "sampler.alg_temp"),
        ({"kind": "confidence", "threshold": 0.9, "transfer": "even"}, "sampler.transfer"),
        ({"kind": "random", "tempered_order": True}, "sampler.tempered_order"),
        ({"kind": "random", "confidence_eos_eot_inf": True}, "sampler.confidence_eos_eot_inf"),
        ({"kind": "first_hitting", "eps": 0.1}, "sampler.eps"),
        ({"guidance": 2.0}, "sampler.guidance"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings_that_would_be_ignored_are_refused(keys, name):
    with pytest.raises(UserError) as caught:
        SamplerConfig(**keys).validate()
    assert name in str(caught.value)
