"""Keys of published decoders on the command line: lengths, [BOS], ends, guidance by the prompt, adaptive steps."""

import itertools
import json
from dataclasses import asdict, replace

import pytest

import scmdm
from scmdm.cli import main
from scmdm.config.sampling import SamplerConfig
from scmdm.study.study_plan import has_settings, stored_row

LLADA = ["sampler.kind=confidence", "sampler.transfer=even", "sampler.block_start=prompt", "sampler.temperature=0"]


def drawn(base, out, *keys):
    assert main(["sample", str(base), "precision=float32", *keys, f"out={out}"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("CC\nNCCOC\n")
    return f"prompts={tmp_path / 'prompts.txt'}"


@pytest.mark.parametrize(
    "sampler",
    [
        [*LLADA, "sampler.block_length=3", "sampler.steps=4"],
        ["sampler.kind=random", "sampler.block_length=2", "sampler.steps=3", "sampler.block_start=prompt"],
        ["sampler.kind=confidence", "sampler.factor=1.0"],
        ["sampler.kind=entropy", "sampler.transfer=ratio", "sampler.eps=1e-3", "sampler.tempered_order=true"],
    ],
    ids=["llada", "random", "factor", "dream"],
)
def test_prompts_of_different_lengths_have_the_same_gen_length(base, tmp_path, prompts, sampler):
    keys = [prompts, "num=3", "gen_length=6", *sampler]
    rows = drawn(base, tmp_path / "together.jsonl", *keys)
    assert rows == drawn(base, tmp_path / "apart.jsonl", *keys, "batch_size=2")
    tokenizer = scmdm.load(base).tokenizer
    for number, row in enumerate(rows):
        prompt = "CC" if number < 3 else "NCCOC"
        given = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        assert row["tokens"][: len(given)] == given
        assert len(row["tokens"]) == 1 + 5 + 6 and tokenizer.mask_id not in row["tokens"]
        assert set(row["tokens"][len(given) + 6 :]) <= {tokenizer.pad_id}
        assert 1 <= row["evaluations"] <= (32 if "sampler.steps" not in " ".join(sampler) else 6)
    alone = drawn(base, tmp_path / "alone.jsonl", "prompt=CC", "num=3", "gen_length=6", *sampler)
    assert [row["text"] for row in alone] == [row["text"] for row in rows[:3]]


def test_a_prompt_without_bos(base, tmp_path):
    tokenizer = scmdm.load(base).tokenizer
    for extra in ([], ["gen_length=4"]):
        rows = drawn(base, tmp_path / "a.jsonl", "prompt=CN", "num=2", "add_bos_token=false", *extra)
        assert all(row["tokens"][:2] == tokenizer.encode("CN") and row["text"].startswith("CN") for row in rows)
    rows = drawn(base, tmp_path / "a.jsonl", "infill=C[MASK]N", "num=2", "add_bos_token=false")
    assert all(row["tokens"][0] == tokenizer.encode("C")[0] for row in rows)


def test_a_sample_ends_at_any_end_token(base, tmp_path):
    keys = ["prompt=CC", "num=20", "sampler.steps=8"]
    free = drawn(base, tmp_path / "free.jsonl", *keys)
    ended = drawn(base, tmp_path / "ended.jsonl", *keys, "sampler.end_tokens=[C,O]")
    assert any("C" in row["text"][2:] for row in free)
    tokenizer = scmdm.load(base).tokenizer
    ends = {tokenizer.eos_id, *tokenizer.encode("CO")}
    for whole, cut in zip(free, ended, strict=True):
        assert cut["tokens"] == whole["tokens"]
        answer = itertools.takewhile(lambda token: token not in ends, cut["tokens"][3:])
        assert cut["text"] == "CC" + tokenizer.decode(list(answer))


def test_end_tokens_that_are_suppressed(base, tmp_path):
    loaded = scmdm.load(base)
    keys = ["prompt=C", "num=10", *LLADA, "sampler.temperature=1", "sampler.steps=8"]
    assert any(loaded.tokenizer.eos_id in row["tokens"] for row in drawn(base, tmp_path / "free.jsonl", *keys))
    rows = drawn(base, tmp_path / "never.jsonl", *keys, "sampler.block_length=23", "sampler.logits_eos_inf=true")
    assert not any(loaded.tokenizer.eos_id in row["tokens"] for row in rows)


def test_guidance_by_the_prompt_costs_two_evaluations(base, tmp_path):
    keys = ["prompt=CCO", "num=4", "gen_length=6", *LLADA, "sampler.steps=3", "sampler.temperature=1"]
    plain = drawn(base, tmp_path / "plain.jsonl", *keys)
    guided = drawn(base, tmp_path / "guided.jsonl", *keys, "sampler.guided_by=prompt", "sampler.guidance=1e5")
    assert [row["evaluations"] for row in (*plain, *guided)] == [3] * 4 + [6] * 4
    assert [row["tokens"] for row in plain] != [row["tokens"] for row in guided]


def test_confidence_decides_how_many_steps_there_are(base, tmp_path):
    keys = ["prompt=C", "num=4", "gen_length=8", "sampler.kind=confidence", "sampler.temperature=0"]
    for threshold, evaluations in (("0.0", 1), ("1.0", 8)):
        rows = drawn(base, tmp_path / "a.jsonl", *keys, f"sampler.threshold={threshold}")
        assert [row["evaluations"] for row in rows] == [evaluations] * 4


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["gen_length=4", "length=9"], "length=9"),
        (["gen_length=4", "infill=C[MASK]"], "infill="),
        (["prompt=C", "gen_length=0"], "gen_length=0"),
        (["prompt=C", "gen_length=8", *LLADA, "sampler.block_length=2", "sampler.steps=3"], "sampler.steps=3"),
        (["sampler.end_tokens=['<|im_end|>']"], "<|im_end|>"),
        (["sampler.threshold=0.9"], "sampler.threshold"),
        (["infill=CCO"], "infill='CCO'"),
        (["infill=CCO", "sampler.block_start=prompt"], "infill='CCO'"),
        (["prompt=CCO", "length=4"], "prompt has 4 tokens"),
        (["chat=true"], "chat=true"),
        (["chat=true", "infill=C[MASK]"], "chat=true"),
        (["sampler.cache_check=8"], "sampler.cache_check=8"),
        (["sampler.guided_by=prompt", "prompt=C"], "sampler.guided_by='prompt'"),
        (["sampler.guided_by=prompt", "sampler.guidance=2"], "sampler.guided_by"),
        (["sampler.guided_by=prompt", "sampler.guidance=2", "prompt="], "sampler.guided_by"),
    ],
)
def test_mistakes(base, capsys, keys, name):
    assert main(["sample", str(base), *keys]) == 1
    assert name in capsys.readouterr().err


def finished_row(path, settings):
    row = stored_row(path)
    return row if row is not None and has_settings(row, settings) else None


def test_measurements_of_before_these_keys_are_kept(tmp_path):
    settings = {
        "name": "base_T4_s0",
        "kind": "samples",
        "metrics_config": {},
        "sampler": asdict(SamplerConfig(steps=4)),
    }
    added = (
        "eps",
        "noise_removal",
        "transfer",
        "threshold",
        "factor",
        "block_start",
        "tempered_order",
        "alg_temp",
        "guided_by",
    )
    result = {"nelbo": {}}  # of any kind
    row = {**settings, **result, "sampler": {k: v for k, v in settings["sampler"].items() if k not in added}}
    path = tmp_path / "row.json"
    path.write_text(json.dumps(row))
    assert finished_row(path, settings) is not None
    float32 = {**settings, "sampler": {**settings["sampler"], "gumbel": "float32"}}
    path.write_text(json.dumps({**row, "sampler": {**row["sampler"], "gumbel": "float32"}}))
    assert finished_row(path, float32) is None, "the draw was another one"
    path.write_text(json.dumps({**row, "sampler": float32["sampler"]}))
    assert finished_row(path, float32) is not None
    path.write_text(json.dumps(row))
    other = asdict(replace(SamplerConfig(steps=4), kind="confidence", transfer="even"))
    assert finished_row(path, {**settings, "sampler": other}) is None
