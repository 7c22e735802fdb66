"""Sets of samples: the same on any division over ranks and batches, resumable, and in halves when memory is short."""

import itertools
import json

import numpy as np
import pytest
import torch

from scmdm.cli import main
from scmdm.config.sampling import SamplerConfig
from scmdm.errors import UserError
from scmdm.evaluation.divided_nelbo import NelboSettings
from scmdm.evaluation.zero_shot import zero_shot
from scmdm.runtime.divided_work import ResultParts, share_of
from scmdm.sampling.generation import SampleSet, generate, generate_divided
from scmdm.sampling.model_loading import load
from scmdm.sampling.templates import make_model_template, pad_templates
from tests.sampling.small_models import export

SAMPLERS = {
    "ancestral": SamplerConfig(steps=6),
    "plain": SamplerConfig(steps=6, carry="never"),
    "first_hitting": SamplerConfig(kind="first_hitting"),
    "threshold": SamplerConfig(kind="confidence", threshold=0.2, temperature=0.7),
    "blocks": SamplerConfig(kind="margin", steps=8, block_length=5, temperature=1.5),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("sampling") / "model")


@pytest.fixture(scope="module")
def model(exported):
    return load(exported, device="cpu")


def sample_set(model, sampler=None, num=13, seed=2, **keys):
    return SampleSet(model, sampler or SAMPLERS["ancestral"], num=num, seed=seed, precision="float32", **keys)


def tokens_of(results):
    return torch.tensor(np.concatenate([columns["tokens"] for _, columns in results]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_the_same_to_the_bit_on_any_ranks_and_in_any_batches(model, name):
    expected = generate(model, SAMPLERS[name], num=7, seed=2, precision="float32")
    for ranks, batch_size in ((1, 1), (2, 3), (3, None)):
        samples = sample_set(model, SAMPLERS[name], num=7)
        shares = [share_of(range(7), rank, ranks) for rank in range(ranks)]
        results = [part for share in shares for part in samples.draw(share, batch_size=batch_size)]
        assert [number for numbers, _ in results for number in numbers] == list(range(7))
        assert torch.equal(tokens_of(results), expected.tokens)
        assert [int(n) for _, part in results for n in part["evaluations"]] == expected.counts


def test_templates_of_different_lengths_are_the_same_in_any_batches(model):
    mask, pad = model.spec.mask_id, model.tokenizer.pad_id
    templates = torch.full((3, 10), mask)
    lengths = torch.tensor([10, 7, 4])
    for row, length in zip(templates, lengths.tolist(), strict=True):
        row[length:], row[0] = pad, model.tokenizer.bos_id
    keys = {"num": 3, "templates_PL": templates, "lengths_P": lengths}
    whole = tokens_of(sample_set(model, **keys).draw(range(9)))
    single = tokens_of(sample_set(model, **keys).draw(range(9), batch_size=1))
    assert torch.equal(whole, single) and whole.shape == (9, 10)


@pytest.mark.parametrize("policy", ["loss", "eos"])
def test_what_a_data_set_is_padded_with_is_framed(tmp_path, policy):
    loaded = load(export(tmp_path / "model", pad_policy=policy), device="cpu")
    given = make_model_template(loaded, loaded.spec.length, infill="ab[MASK]")
    given[given == loaded.spec.mask_id] = loaded.tokenizer.encode("c")[0]
    assert int(given[-1]) == loaded.manifest.padding_id
    drawn = generate(loaded, SAMPLERS["ancestral"], num=1, seed=0, templates_PL=given[None], precision="float32")
    assert drawn.tokens.tolist() == [given.tolist()] and drawn.texts == ["abc"] and drawn.framed == [True]
    longer = torch.cat([given, given[-1:]])
    templates, lengths = pad_templates([given, longer], loaded.manifest.padding_id)
    samples = SampleSet(
        loaded, SAMPLERS["ancestral"], num=1, seed=0, templates_PL=templates, lengths_P=lengths, precision="float32"
    )
    assert tokens_of(samples.draw([0])).tolist() == [longer.tolist()]


class Killed(Exception):
    pass


def test_a_second_start_draws_only_what_is_missing(model, tmp_path, monkeypatch):
    expected = generate_divided(sample_set(model))
    drawn, draw = [], SampleSet._draw_batch

    def count(self, ids_B, on_step):
        if len(drawn) == 6:
            raise Killed
        drawn.extend(ids_B.tolist())
        return draw(self, ids_B, on_step)

    monkeypatch.setattr(SampleSet, "_draw_batch", count)
    parts = ResultParts.beside(tmp_path / "out.jsonl", model="m")
    with pytest.raises(Killed):
        generate_divided(sample_set(model), batch_size=3, parts=parts)
    earlier = [np.load(path)["seconds"] for path in parts.directory.glob("*.npz")]
    monkeypatch.setattr(SampleSet, "_draw_batch", lambda *keys: drawn.extend(keys[1].tolist()) or draw(*keys))
    again = generate_divided(sample_set(model), batch_size=4, parts=parts)
    assert sorted(drawn) == list(range(13)), "each sample is drawn once in both starts together"
    assert torch.equal(again.tokens, expected.tokens) and again.texts == expected.texts
    both = np.concatenate([np.load(path)["seconds"] for path in parts.directory.glob("*.npz")])
    assert sum(map(len, earlier)) == 6 and len(both) == 13 and min(both) > 0
    assert again.seconds == pytest.approx(sum(both)), "the seconds of both starts"


def test_the_seconds_are_those_of_the_ranks_that_draw(model, monkeypatch):
    alone = SampleSet(model, SAMPLERS["ancestral"], num=1, seed=2)
    monkeypatch.setattr("scmdm.sampling.generation.joined_world", lambda: (0, 8))
    clock = itertools.count()
    monkeypatch.setattr("scmdm.sampling.generation.time.perf_counter", lambda: float(next(clock)))
    assert generate_divided(alone).seconds == 1.0


def test_every_setting_that_changes_samples_changes_the_key(model):
    key = sample_set(model).key()
    templates = torch.full((1, model.spec.length), model.spec.mask_id)
    others = (
        sample_set(model, seed=3),
        sample_set(model, num=14),
        sample_set(model, SamplerConfig(steps=7)),
        sample_set(model, SamplerConfig(steps=6, temperature=0.5)),
        sample_set(model, templates_PL=templates),
        sample_set(model, templates_PL=templates, lengths_P=torch.tensor([9])),
        SampleSet(model, SAMPLERS["ancestral"], num=13, seed=2, precision="bfloat16"),
    )
    keys = [json.dumps(own) for own in (key, *(other.key() for other in others))]
    assert len(set(keys)) == len(keys) and json.dumps(sample_set(model).key()) == keys[0]


def test_a_batch_that_does_not_fit_is_halved_once(model, monkeypatch):
    expected, sizes, most = generate_divided(sample_set(model)), [], 4
    hidden = model.model.hidden

    def small_memory(state, **keys):
        sizes.append(len(state.z_BL))
        if len(state.z_BL) > most:
            raise torch.OutOfMemoryError
        return hidden(state, **keys)

    monkeypatch.setattr(model.model, "hidden", small_memory)
    again = generate_divided(sample_set(model), batch_size=7)
    assert torch.equal(again.tokens, expected.tokens)
    assert set(sizes[1:]) <= set(range(1, most + 1)) | {7}
    most = 2
    with pytest.raises(UserError, match="batch_size=4"):
        generate_divided(sample_set(model), batch_size=7)
    monkeypatch.setattr(model.model, "hidden", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_divided(sample_set(model))


def parameter_bytes(model):
    return sum(parameter.nbytes for parameter in model.model.parameters())


@pytest.mark.parametrize("kind", ["dit", "decoder"])
@pytest.mark.parametrize("head_precision", ["compute", "float32"])
def test_weights_in_bfloat16_need_half_the_memory_and_find_nearly_the_same_nelbo(tmp_path, kind, head_precision):
    place = export(tmp_path / "model", kind=kind, head_precision=head_precision, spread=0.1)
    whole, half = (load(place, device="cpu", weights_dtype=dtype) for dtype in ("float32", "bfloat16"))
    kept = sum(p.nbytes for name, p in whole.model.named_parameters() if not name.startswith("blocks."))
    kept = kept if head_precision == "float32" else 0
    assert parameter_bytes(half) == (parameter_bytes(whole) - kept) / 2 + kept
    assert half.model.head()[0].dtype == (torch.float32 if head_precision == "float32" else torch.bfloat16)
    texts = ["abc defgh", "hhh", "fedcba a b"]
    settings = NelboSettings(draws=8, precision="bfloat16")
    found = [zero_shot(loaded, texts, settings, condition=True).nelbo.mean for loaded in (whole, half)]
    assert found[1] == pytest.approx(found[0], rel=0.01) and found[1] != found[0]
    tokens = generate(half, SAMPLERS["threshold"], num=4, seed=0, precision="bfloat16").tokens
    assert not bool((tokens == half.spec.mask_id).any())


def test_the_estimate_of_a_nelbo_may_come_from_several_passes(model, monkeypatch):
    """Each pass is conditioned on the one before; the noise is the same."""
    given, estimate = [], model.model.estimate

    def noted(state, *, dropout=False):
        found = estimate(state, dropout=dropout)
        given.append((state.estimate_BLD, found))
        return found

    monkeypatch.setattr(model.model, "estimate", noted)
    means = {}
    for passes in (1, 3):
        given.clear()
        settings = NelboSettings(draws=1, passes=passes, precision="float32")
        means[passes] = zero_shot(model, ["abc"] * 5, settings, condition=True).nelbo.mean
        assert len(given) == passes and given[0][0] is None
        assert all(later[0] is earlier[1] for earlier, later in itertools.pairwise(given))
    assert means[3] != means[1]
    given.clear()
    zero_shot(model, ["abc"] * 5, NelboSettings(draws=1, passes=3), condition=False)
    assert given == []


def test_texts_have_the_same_nelbo_in_any_batches(model):
    texts = ["abc"] * 5 + ["a b c d e f"] * 20 + ["hgfed"] * 10
    found = [
        zero_shot(model, texts, NelboSettings(draws=2, precision="float32", batch_size=size), condition=condition).nelbo
        for condition in (True, False)
        for size in (None, 1, 5, 16)
    ]
    for one in found:
        same = found[0] if one in found[:4] else found[4]
        assert one.mean == pytest.approx(same.mean, rel=1e-6) and one.stderr == pytest.approx(same.stderr, rel=1e-5)
    assert found[0].mean != pytest.approx(found[4].mean, rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["weights_dtype=bfloat16", "precision=float32"], "precision='float32'"),
        (["shards=2"], "shards=2"),
        (["shards=0"], "shards=0"),
        (["batch_size=0"], "batch_size=0"),
    ],
)
def test_keys_that_are_not_possible(exported, capsys, keys, name):
    assert main(["sample", str(exported), "num=2", "device=cpu", *keys]) == 1
    assert name in capsys.readouterr().err
