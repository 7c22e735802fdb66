"""Commands on models of blocks, and caches of other models: samples, costs, and what is refused by name."""

import json

import pytest
import torch

from scmdm.cli import main
from scmdm.config.sampling import SamplerConfig
from scmdm.errors import UserError
from scmdm.models.compilation import cpp_compiler
from scmdm.sampling.generation import SampleSet, generate
from scmdm.sampling.model_loading import load
from tests.sampling.small_models import LENGTH, TOKENIZER, export

SIZE = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {
        "blocks": export(place / "blocks", block_length=SIZE),
        "plain": export(place / "plain"),
        "shifted": export(place / "shifted", kind="decoder", logit_shift=True, block_length=SIZE),
    }


def rows(model, out, *keys):
    assert main(["sample", str(model), "num=6", "precision=float32", *keys, f"out={out}"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    "keys",
    [
        ["sampler.steps=8"],
        ["sampler.kind=confidence", "sampler.threshold=0.3", "prompt=abcab"],
        ["sampler.kind=first_hitting", "prompt=ab", "gen_length=9"],
        ["sampler.kind=margin", "sampler.steps=8", "prompt=abc", "sampler.guidance=1.5", "sampler.guided_by=prompt"],
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["blocks", "shifted"])
def test_the_command_caches_finished_blocks(keys, model, models, tmp_path, capsys):
    """By default, with the samples and evaluations that there are without."""
    cached = rows(models[model], tmp_path / "cached.jsonl", *keys)
    reported = capsys.readouterr().err
    plain = rows(models[model], tmp_path / "plain.jsonl", *keys, "sampler.cache=none")
    for ours, theirs in zip(cached, plain, strict=True):
        assert {**ours, "positions": 0} == {**theirs, "positions": 0}
        assert ours["positions"] < theirs["positions"]
    assert str(max(row["positions"] for row in cached)) in reported


@pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_windows_of_a_compiled_model_are_evaluated_as_they_are(models, tmp_path):
    """A compiled block would read other keys and values than those in the cache."""
    for model, keys in (("blocks", []), ("plain", ["sampler.cache=prefix", "sampler.block_length=4"])):
        keys = ["sampler.kind=confidence", "sampler.steps=8", *keys]
        plain = rows(models[model], tmp_path / "plain.jsonl", *keys)
        assert rows(models[model], tmp_path / "compiled.jsonl", *keys, "compile=block") == plain


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_the_command_reports_how_far_an_approximate_cache_is_off(cache, models, tmp_path, capsys):
    keys = ["sampler.kind=random", "sampler.block_length=4", "sampler.steps=16", "sampler.cache_check=2"]
    drawn = rows(models["plain"], tmp_path / "a.jsonl", *keys, f"sampler.cache={cache}")
    reported = capsys.readouterr().err
    assert f"sampler.cache={cache}" in reported and "%" in reported
    assert all(row["evaluations"] == 16 and row["positions"] < 16 * LENGTH for row in drawn)
    again = rows(models["plain"], tmp_path / "b.jsonl", *keys, f"sampler.cache={cache}", "batch_size=1")
    assert [row["tokens"] for row in again] == [row["tokens"] for row in drawn]


@pytest.mark.parametrize(
    ("model", "keys", "named"),
    [
        ("blocks", {"block_length": 8}, "sampler.block_length=8"),
        ("blocks", {"block_start": "prompt"}, "sampler.block_start='prompt'"),
        ("blocks", {"cache": "dual"}, "sampler.cache='dual'"),
        ("blocks", {"steps": 3}, "sampler.steps=3"),
        ("blocks", {"eps": 0.1, "noise_removal": "draw"}, "sampler.noise_removal='draw'"),
        ("plain", {"cache": "blocks"}, "sampler.cache='blocks'"),
        ("shifted", {"cache": "prefix"}, "sampler.cache='prefix'"),
    ],
    ids=str,
)
def test_keys_that_a_model_does_not_have_are_refused(model, keys, named, models):
    with pytest.raises(UserError, match=named):
        SampleSet(load(models[model], device="cpu"), SamplerConfig(**keys), num=1, seed=0)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_an_approximate_cache_without_blocks_is_refused(cache):
    with pytest.raises(UserError, match=f"sampler.cache='{cache}'"):
        SamplerConfig(cache=cache).validate()


def test_what_follows_a_block_to_fill_in_is_refused(models):
    """It would not be seen; within the block it is."""
    loaded, mask = load(models["blocks"], device="cpu"), TOKENIZER.mask_id
    given = torch.randint(4, 9, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    seen, later = given.clone(), given.clone()
    seen[0, LENGTH - 3] = seen[0, LENGTH - 2] = mask
    later[0, 5] = mask
    sampler = SamplerConfig(steps=8)
    assert torch.equal(
        generate(loaded, sampler, num=1, seed=0, templates_PL=seen).tokens[seen != mask], seen[seen != mask]
    )
    with pytest.raises(UserError, match=f"diffusion.block_length={SIZE}"):
        SampleSet(loaded, sampler, num=1, seed=0, templates_PL=later)


def test_a_model_with_one_time_for_all_blocks_is_refused(tmp_path):
    place = export(tmp_path / "model", block_length=SIZE, time_conditioning=True)
    with pytest.raises(UserError, match=f"diffusion.block_length={SIZE}"):
        load(place, device="cpu")
