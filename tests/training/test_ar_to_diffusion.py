"""From an autoregressive model to a diffusion model: `scmdm adapt` with `train.causal_steps`."""

import json
import random

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from scmdm.cli import main
from scmdm.models.model_files import read_spec
from tests.conftest import ROOT
from tests.convert.published import WORDS, write_tokenizer
from tests.kills import adapt_arguments, assert_same_run, train_rows

LENGTH = 24


def annealed(run, base, molecules, config, *overrides):
    return adapt_arguments(run, base, molecules, config, "schedule.kind=constant", "train.causal_steps=6", *overrides)


def test_a_run_that_stops_amid_the_annealing_continues_exactly(tmp_path, base, molecules, empty_yaml):
    first = annealed(tmp_path / "a", base, molecules, empty_yaml, "train.steps=3")
    assert main(first) == 0
    assert main([*first, "train.steps=8"]) == 0
    assert main(annealed(tmp_path / "b", base, molecules, empty_yaml, "train.steps=8")) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    at_once = annealed(tmp_path / "c", base, molecules, empty_yaml, "train.steps=3", "train.causal_steps=0")
    assert main(at_once) == 0
    assert train_rows(tmp_path / "c")[0]["loss"] != train_rows(tmp_path / "b")[0]["loss"]


@pytest.mark.parametrize(
    ("command", "overrides", "named"),
    [
        ("train", [], "train.causal_steps"),
        ("adapt", ["fsdp.context=2"], "train.causal_steps"),
        ("adapt", ["diffusion.block_length=4"], "train.causal_steps"),
    ],
)
def test_where_there_is_no_annealing_it_is_refused(
    tmp_path, base, molecules, empty_yaml, capsys, command, overrides, named
):
    arguments = annealed(tmp_path / "no", base, molecules, empty_yaml, "train.steps=3", *overrides)
    if command == "train":
        arguments = ["train", *(part for part in arguments[1:] if not part.startswith(("base=", "self_cond")))]
    assert main(arguments) == 1
    assert named in capsys.readouterr().err and not (tmp_path / "no").exists()


def sentences(count):
    """Texts of a Markov chain: each letter is one or two places after the one before it, in a circle of eleven."""
    letters, draw = "abcdefghijk", random.Random(0)
    for _ in range(count):
        place = draw.randrange(11)
        text = []
        for _ in range(LENGTH - 2):
            text.append(letters[place])
            place = (place + draw.choice((1, 2))) % 11
        yield "".join(text)


def autoregressive_model(texts, steps):
    """A tiny Qwen3, trained by `transformers` to predict the next letter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": len(WORDS)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}
    special = {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": LENGTH}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **special))
    ids = torch.tensor([[0, *(WORDS.index(letter) for letter in text), 0] for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = ids[torch.arange(64 * step, 64 * step + 64) % len(ids)]
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, float(loss)


@pytest.mark.slow
@pytest.mark.long
def test_the_recipe_makes_a_diffusion_model_of_an_autoregressive_one(tmp_path):
    """The shipped recipe at the size of this model: the loss falls, below that of a model that is not pretrained."""
    texts = list(dict.fromkeys(sentences(3000)))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    losses = {}
    for name, steps in (("trained", 100), ("random", 1)):
        model, loss = autoregressive_model(texts, steps)
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name / "tokenizer.json")
        assert main(["import", str(tmp_path / name), str(tmp_path / f"{name}-base")]) == 0
        assert (loss < 0.9) == (name == "trained")
    tokenizer = f"tokenizer.path={tmp_path / 'trained-base' / 'tokenizer.json'}"
    keys = ["source.name=text", f"source.path={tmp_path / 'texts.jsonl'}", "tokenizer.name=huggingface", tokenizer]
    (tmp_path / "empty.yaml").write_text("{}\n")
    keys += [f"out={tmp_path / 'data'}", f"length={LENGTH}", "framing=records"]
    assert main(["prepare", str(tmp_path / "empty.yaml"), *keys]) == 0
    spec = read_spec(tmp_path / "trained-base")
    size = [f"model.{key}={getattr(spec.model, key)}" for key in ("width", "layers", "heads", "head_width", "kv_heads")]
    size += ["model.mlp_width=128", "model.rotary_base=10000", "engine=single", "precision=float32", "device=cpu"]
    short = ["train.steps=100", "train.causal_steps=30", "train.global_batch_size=64", "train.micro_batch_size=64"]
    short += ["schedule.warmup_steps=5", "optimizer.lr=1e-3", "ema.decay=0.9", "train.log_every=1"]
    short += ["train.validate_every=100", "data.num_workers=0"]
    for name in ("trained", "random"):
        place = [
            f"base={tmp_path / f'{name}-base'}",
            f"run_dir={tmp_path / name}-run",
            f"data.path={tmp_path / 'data'}",
        ]
        assert main(["adapt", str(ROOT / "configs/text/ar-to-diffusion.yaml"), *place, *size, *short]) == 0
        rows = [json.loads(line) for line in (tmp_path / f"{name}-run" / "metrics.jsonl").read_text().splitlines()]
        found = [row["loss"] for row in rows if "loss" in row]
        losses[name] = found[:10], found[-20:]
    mean = {name: [sum(part) / len(part) for part in parts] for name, parts in losses.items()}
    assert mean["trained"][1] < 0.8 * mean["trained"][0]
    assert mean["trained"][1] < 0.97 * mean["random"][1]
    assert main(["export", str(tmp_path / "trained-run"), str(tmp_path / "back"), "format=qwen3"]) == 0
