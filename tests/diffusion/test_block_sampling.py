"""Samplers of a model of blocks, with and without a cache of finished blocks, and approximate caches."""

import itertools
from dataclasses import replace

import pytest
import torch

from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.reveal_order import ORDERS, SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.rotary import Rotary, RotaryScaling
from scmdm.planner.activation_memory import LiveBytes
from tests.diffusion.oracle import BlockOracle
from tests.diffusion.test_blocks import MASK, noised, small_model, tokens
from tests.diffusion.test_sampler import certainty_of, chi_squared, exact_distribution

SIZE, LENGTH = 4, 14
SAMPLERS = {
    "ancestral": {"steps": 9},
    "remasked": {"steps": 12, "remask": "rescale", "remask_eta": 0.5, "remasked_estimate": "null"},
    "capped": {"steps": 12, "remask": "cap", "remask_eta": 0.2},
    "first_hitting": {"kind": "first_hitting"},
    "random": {"kind": "random", "steps": 9},
    **{kind: {"kind": kind, "steps": 9} for kind in ORDERS},
    "threshold": {"kind": "confidence", "threshold": 0.4},
    "margins": {"kind": "margin", "threshold": 0.2},
    "factor": {"kind": "confidence", "factor": 1.0},
    "float32": {"steps": 9, "gumbel": "float32"},
    "idle steps skipped": {"steps": 40, "idle_steps": "skip"},
    "idle steps skipped, ranked": {"kind": "confidence", "steps": 40, "idle_steps": "skip"},
}


def settings_of(name, cache="blocks", size=SIZE, **more):
    of_blocks = {"block_length": size, "model_of_blocks": cache != "dual" and cache != "prefix", "cache": cache}
    return SamplerSettings(**SAMPLERS[name] | of_blocks | more)


@pytest.fixture(scope="module")
def trained():
    """A model of blocks after some steps on sequences that count up."""
    model = small_model("dit", SIZE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        x = (
            torch.arange(LENGTH) + torch.randint(0, MASK, (32, 1), generator=torch.Generator().manual_seed(step))
        ) % MASK
        loss = self_conditioned_nelbo(model, noised(x, SIZE, step=step), LogLinear(), condition=True).loss / x.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 1.2
    return model.eval()


def prompts(ranked=False):
    """No prompt; prompts that end within the first block, at its end, and within the third.

    Masked positions of a sequence without any token are equally certain, and rounding would decide between them: if
    positions are ranked, such sequences begin with a token.
    """
    given = torch.full((8, LENGTH), MASK)
    for row, size in ((1, 2), (2, 4), (3, 9), (5, 4), (6, 9)):
        given[row, :size] = torch.arange(size) % MASK
    if ranked:
        given[[0, 4, 7], 0] = torch.tensor([0, 1, 2])
    return given


def draw(model, settings, given=None, **more):
    given = prompts(ranked=settings.kind in ORDERS) if given is None else given
    ids = torch.arange(len(given))
    return sample(model, given, ids, schedule=LogLinear(), settings=settings, mask_id=MASK, seed=0, **more)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_cached_and_uncached_samples_are_equal(name, carry, trained):
    """Token for token, with as many evaluations, of fewer positions."""
    settings = settings_of(name, carry=carry)
    cached, plain = draw(trained, settings), draw(trained, replace(settings, cache="none"))
    assert torch.equal(cached.tokens, plain.tokens)
    assert torch.equal(cached.evaluations_B, plain.evaluations_B)
    assert (cached.positions_B < plain.positions_B).all()
    assert len({tuple(row) for row in cached.tokens.tolist()}) > 4


@pytest.mark.parametrize("kind", ["decoder", "shifted"])
@pytest.mark.parametrize("name", ["ancestral", "confidence", "threshold"])
def test_decoders_with_and_without_a_cache(kind, name):
    """Grouped keys and values; predictions from the position before, which may be in the block before."""
    model, settings = small_model(kind, SIZE), settings_of(name, carry=True, logit_shift=kind == "shifted")
    cached, plain = draw(model, settings), draw(model, replace(settings, cache="none"))
    assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.evaluations_B, plain.evaluations_B)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["blocks", "prefix", "dual"])
def test_angles_that_depend_on_the_length_are_those_of_the_sequence(cache, padded):
    """Dynamic rotary scaling with a cache: keys have the angles of the whole sequence, without its padding."""
    model = small_model("decoder", SIZE if cache == "blocks" else None)
    plain = model.rotary_emb
    model.rotary_emb = Rotary(plain.head_width, plain.base, RotaryScaling("dynamic", 8.0, length=6))
    model.rotary_emb.reset_parameters()
    assert not torch.equal(model.rotary_emb(LENGTH), plain(LENGTH))
    lengths = torch.tensor([14, 11, 5, 12, 9, 14, 13, 7]) if padded else None
    given = prompts(ranked=True)
    if padded:
        given[torch.arange(LENGTH) >= lengths[:, None]] = 0
    settings = settings_of("confidence", cache, carry=True, cache_check=1)
    cached = draw(model, settings, given, lengths_B=lengths)
    whole = draw(model, replace(settings, cache="none"), given, lengths_B=lengths)
    if cache == "blocks":
        assert torch.equal(cached.tokens, whole.tokens)
    for row in (1, 4):
        own, end = slice(row, row + 1), None if lengths is None else int(lengths[row])
        alone = sample(
            model, given[own, :end], torch.tensor([row]), schedule=LogLinear(), settings=settings, mask_id=MASK, seed=0,
            lengths_B=None if lengths is None else lengths[own],
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], cached.tokens[row, :end])


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("guided_by", ["prompt", "none"])
def test_guidance_padding_and_batches(guided_by, carry, trained):
    more = {"guidance": 1.7, "guided_by": "prompt"} if guided_by == "prompt" else {}
    given = prompts(ranked=True)
    lengths = torch.tensor([14, 11, 14, 12, 9, 14, 13, 5])
    given[torch.arange(LENGTH) >= lengths[:, None]] = 0
    settings = settings_of("confidence", carry=carry, **more)
    cached = draw(trained, settings, given, lengths_B=lengths)
    plain = draw(trained, replace(settings, cache="none"), given, lengths_B=lengths)
    assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.evaluations_B, plain.evaluations_B)
    for row in (1, 4, 6):
        own = slice(row, row + 1)
        alone = sample(
            trained,
            given[own, : lengths[row]],
            torch.tensor([row]),
            schedule=LogLinear(),
            settings=settings,
            mask_id=MASK,
            seed=0,
            lengths_B=lengths[own],
        )
        assert torch.equal(alone.tokens[0], cached.tokens[row, : lengths[row]])
        assert int(alone.positions_B) == int(cached.positions_B[row])


@pytest.mark.parametrize("kind", ["dit", "decoder", "shifted"])
@pytest.mark.parametrize("cache", ["blocks", "prefix", "dual"])
def test_sequences_of_different_lengths_with_a_cache(cache, kind):
    """Padded sequences in one batch have the tokens that each has alone, also where positions are shifted."""
    model = small_model(kind, SIZE if cache == "blocks" else None)
    lengths = torch.tensor([14, 11, 5, 12, 9, 14, 13, 7])
    given = prompts()
    given[:, 0] = 0  # in a sequence of masks, all positions of a decoder are equally certain
    given[torch.arange(LENGTH) >= lengths[:, None]] = 0
    settings = settings_of("confidence", cache, carry=True, cache_check=1, logit_shift=kind == "shifted")
    together = draw(model, settings, given, lengths_B=lengths)
    if cache == "blocks":
        whole = draw(model, replace(settings, cache="none"), given, lengths_B=lengths)
        assert torch.equal(together.tokens, whole.tokens)
    for row, length in enumerate(lengths.tolist()):
        own = torch.tensor([row])
        alone = sample(
            model, given[row : row + 1, :length], own, schedule=LogLinear(), settings=settings, mask_id=MASK, seed=0,
            lengths_B=lengths[own],
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], together.tokens[row, :length])


@pytest.mark.parametrize("cache", ["none", "blocks"])
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "float32"])  # which is not exact
def test_distributions_of_the_oracle(name, carry, cache):
    """Those of an enumeration of all draws; one token at a time is exact in any order that sees no token."""
    oracle = BlockOracle(2, length=4, tokens=2)
    exact, adaptive = name in ("first_hitting", "random"), "steps" not in SAMPLERS[name]
    settings = settings_of(name, cache, size=2, carry=carry, **({} if adaptive else {"steps": 4}))
    given = torch.full((8000, 4), oracle.mask_id)
    drawn = sample(
        oracle, given, torch.arange(8000), schedule=LogLinear(), settings=settings, mask_id=oracle.mask_id, seed=0
    )
    calls = oracle.evaluations
    if exact:
        expected = oracle.joint
    else:
        expected = (adaptive_distribution if adaptive else exact_distribution)(oracle, LogLinear(), settings)
    assert chi_squared(oracle, drawn.tokens, expected) > 1e-3
    assert drawn.evaluations <= 4 and (adaptive or drawn.evaluations == 4)
    assert calls <= 4 if cache == "none" else calls <= 8


def adaptive_distribution(oracle, _, settings):
    """Exact output of threshold decoding, from all draws of each step: two positions at a time, one if neither or one
    is certain enough."""
    assert settings.block_length == 2 == oracle.length // 2
    states = {(oracle.mask_id,) * oracle.length: 1.0}
    while any(oracle.mask_id in state for state in states):
        following = {}
        for state, weight in states.items():
            for result, q in _adaptive_outcomes(oracle, state, settings):
                following[result] = following.get(result, 0.0) + weight * q
        states = following
    return torch.tensor([states.get(tuple(s.tolist()), 0.0) for s in oracle.sequences], dtype=torch.float64)


def _adaptive_outcomes(oracle, state, settings):
    masked = [at for at, token in enumerate(state) if token == oracle.mask_id][: state[:2].count(oracle.mask_id) or 2]
    if not masked:
        yield state, 1.0
        return
    p = oracle.conditionals(torch.tensor([state]))[0]
    for drawn in itertools.product(range(oracle.tokens), repeat=len(masked)):
        score = {at: certainty_of(settings.kind, p[at], token) for at, token in zip(masked, drawn, strict=True)}
        best, *others = sorted(masked, key=lambda at: -score[at])
        # The factor rule reveals the last candidate with the one before it: both.
        together = settings.factor is not None or all(score[at] >= settings.threshold for at in others)
        result = list(state)
        for at, token in zip(masked, drawn, strict=True):
            if at == best or together:
                result[at] = token
        yield tuple(result), float(torch.tensor([p[at, v] for at, v in zip(masked, drawn, strict=True)]).prod())


def test_positions_that_a_cached_sampler_computes(trained):
    """With two steps per block: the block, and in the first step those before it that are not in the cache."""
    given = torch.full((1, 12), MASK)
    settings = settings_of("confidence", carry=True, steps=6)
    assert int(draw(trained, settings, given).positions_B) == (4 + 4) + (8 + 4) + (8 + 4)
    assert int(draw(trained, replace(settings, cache="none"), given).positions_B) == 6 * 12
    given = given.clone()
    given[0, :9] = 1
    assert int(draw(trained, settings, given).positions_B) == 12 + 4
    guided = replace(settings, guidance=2.0, guided_by="prompt")
    assert int(draw(trained, guided, given).positions_B) == 2 * (12 + 4)


def test_the_estimate_lives_within_the_block(trained):
    seen = []

    class Watched:
        block_length = SIZE

        def __getattr__(self, name):
            return getattr(trained, name)

        def hidden(self, state):
            seen.append(state)
            return trained.hidden(state)

    draw(Watched(), settings_of("confidence", "none", carry=True, steps=12), torch.full((3, 12), MASK))
    assert [state.estimate_BLD is None for state in seen] == [True] + [False] * 11
    for number, state in enumerate(seen[1:], start=1):
        block, first = number // 4, number % 4 == 0
        given = state.estimate_BLD.abs().sum(2) > 0
        assert not given[:, : block * 4].any() and not given[:, block * 4 + 4 :].any()
        assert given[:, block * 4 : block * 4 + 4].all() != first


def test_a_denoiser_of_other_blocks_is_refused(trained):
    with pytest.raises(ValueError, match=str(SIZE)):
        draw(trained, SamplerSettings(steps=4))


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_approximate_caches(cache, carry):
    """Exact with one block; otherwise the first step of each block is, and the measured difference is that of both."""
    model = small_model("dit")
    one = settings_of("confidence", cache, size=LENGTH, carry=carry, steps=4)
    assert torch.equal(draw(model, one).tokens, draw(model, replace(one, cache="none")).tokens)
    settings = settings_of("confidence", cache, carry=carry, steps=8, cache_check=1)
    given = torch.full((4, LENGTH), MASK)
    drawn, plain = draw(model, settings, given), draw(model, replace(settings, cache="none"), given)
    assert torch.equal(drawn.tokens, draw(model, replace(settings, cache_check=0), given).tokens)
    assert torch.equal(drawn.evaluations_B, plain.evaluations_B) and drawn.evaluations == 8
    rest = [14, 10, 6, 2] if cache == "prefix" else [4, 4, 4, 2]
    assert drawn.positions_B.tolist() == [4 * LENGTH + sum(rest)] * 4
    compared = 3 if cache == "prefix" else 4  # blocks, of which half is left; prefix evaluates the first as a whole
    assert drawn.deviation.positions == 4 * (2 * compared - 1)
    assert 0 < drawn.deviation.variation < drawn.deviation.positions


@pytest.mark.parametrize("every", [2, 64])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_an_approximate_cache_is_measured_however_many_steps_a_block_has(cache, every):
    """Also where each multiple of `every` is the first step of a block; and independently of the batch."""
    model = small_model("dit")
    settings = settings_of("confidence", cache, steps=8, cache_check=every)  # two for each of four blocks
    given = torch.full((4, LENGTH), MASK)
    together = draw(model, settings, given).deviation
    assert together.positions > 0
    ids = torch.arange(4)
    each = [
        sample(
            model, given[:1], ids[row : row + 1], schedule=LogLinear(), settings=settings, mask_id=MASK, seed=0
        ).deviation.positions
        for row in range(4)
    ]
    assert sum(each) == together.positions and min(each) > 0


@pytest.mark.parametrize("kind", ["decoder", "shifted"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_are_exact_for_a_model_without_attention(cache, kind):
    """What is taken from a cache is then not used, and what is computed stands at its own position.

    With "dual", estimates of later blocks stay those of the block's first step, and are not carried here.
    """
    model = small_model(kind)
    with torch.no_grad():
        for block in model.blocks:
            block.attn_out.weight.zero_()
    more = {"carry": cache == "prefix", "logit_shift": kind == "shifted"}
    settings = settings_of("confidence", cache, steps=8, cache_check=1, **more)
    drawn = draw(model, settings)
    assert torch.equal(drawn.tokens, draw(model, replace(settings, cache="none")).tokens)
    assert drawn.deviation.positions > 0 and drawn.deviation.variation < 1e-4
    assert drawn.deviation.disagreements == 0


@pytest.mark.parametrize("cache", ["none", "blocks", "prefix", "dual"])
def test_memory_has_no_canvas_times_vocabulary(cache):
    """A block's logits and draws, and keys and values of the sequence."""
    vocab, length = 4_000, 512
    config = DiTConfig(width=16, layers=2, heads=2, condition_width=8, self_conditioned=True, head_chunk=32)
    model = DiT(config, vocab_size=vocab, mask_id=vocab - 1, schedule=LogLinear()).eval()
    init_weights(model, 0)
    model.block_length = 16 if cache in ("none", "blocks") else None
    settings = settings_of("confidence", cache, size=16, carry=True, steps=32, cache_check=0)
    given = torch.full((1, length), vocab - 1)
    given[0, : length - 32] = tokens(1, length - 32)
    with LiveBytes(model.parameters()) as live:
        sample(model, given, torch.arange(1), schedule=LogLinear(), settings=settings, mask_id=vocab - 1, seed=0)
    assert live.peak < length * vocab * 4
