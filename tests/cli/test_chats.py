"""Conversations by the command line: from `messages` to an adapted, exported, sampled and evaluated model."""

import json

import numpy as np
import pytest

from scmdm.cli import main
from scmdm.data.loader import read_columns
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import load_tokenizer
from scmdm.data.tokenizers.chat_template import Turn
from scmdm.data.verification import verify_dataset
from tests.chat_tokenizers import write_chat_tokenizer
from tests.conftest import ADAPTED, TINY
from tests.convert.test_decoder_layouts import PUBLISHED, write_published

LENGTH = 112
SPELLED = "say <|im_end|><|eot_id|> {}"


def conversation(i):
    turns = [("user", SPELLED.format(i)), ("assistant", f"{i}!"), ("user", "more"), ("assistant", f"{i}{i}")]
    system = [("system", "short")] if i % 3 == 0 else []
    return system + turns[: 2 if i % 2 else 4]


def write_chats(path, chats):
    rows = ({"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(place, kind, empty_yaml, *more, chats=None):
    """Prepare conversations; the exit status."""
    write_chats(place / "chats.jsonl", chats or [conversation(i) for i in range(100)])
    keys = [f"source.path={place / 'chats.jsonl'}", "source.name=text", "source.messages_key=messages"]
    keys += [f"tokenizer.path={write_chat_tokenizer(place / 'tokenizer', kind)}", "tokenizer.name=huggingface"]
    keys += [f"length={LENGTH}", "workers=1", "validation_fraction=0.2", "test_fraction=0.2", f"out={place / 'data'}"]
    return main(["prepare", str(empty_yaml), *keys, *more])


@pytest.mark.parametrize(("kind", "policy"), [("llada", "eos"), ("qwen", "ignore"), ("dream", "loss")])
def test_data_sets_of_conversations(tmp_path, empty_yaml, kind, policy):
    assert prepared(tmp_path, kind, empty_yaml, f"pad_policy={policy}") == 0
    root = tmp_path / "data"
    manifest, tokenizer = Manifest.read(root), load_tokenizer(root / "tokenizer.json")
    assert verify_dataset(root) == []
    assert manifest.framing == "chats" and manifest.counts == {"read": 100, "kept": 100}
    info = manifest.splits["train"]
    columns = read_columns(root, "train", range(info.samples))
    wanted = {}
    for i in range(100):
        chat = tokenizer.chat.encode([Turn(role, text) for role, text in conversation(i)])
        ends = [] if chat.ids[-1] == tokenizer.eos_id else [tokenizer.eos_id]
        wanted[(*chat.ids, *ends)] = [*chat.given, *(False for _ in ends)]
    padding = tokenizer.eos_id if policy == "eos" else tokenizer.pad_id
    counted = 0
    for row, given in zip(columns["tokens"].tolist(), columns["given_mask"].tolist(), strict=True):
        ids = next(ids for ids in wanted if tuple(row[: len(ids)]) == ids and set(row[len(ids) :]) <= {padding})
        assert given[: len(ids)] == wanted[ids] and not any(given[len(ids) :])
        counted += len(row) - sum(given) if policy != "ignore" else len(ids) - sum(given)
    assert info.tokens == counted
    assert (columns["tokens"][:, 0] == tokenizer.bos_id).all() == (kind == "llada"), "only where the template places it"
    assert not (columns["tokens"] == tokenizer.mask_id).any()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no chat"),
        ("text", "no chat"),
        (["text"], "not an object"),
        ([{"role": "user", "content": "a"}], "last message"),
        ([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}], "another role"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], "not text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}], "weight"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}], "tool_calls"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "another role"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "empty"),
        ([{"role": "user", "content": "a\ufdd1"}, {"role": "assistant", "content": "b"}], "unknown symbol"),
        ([{"role": "assistant", "content": "b"}], "template refuses"),
        ([{"role": "user", "content": "a" * LENGTH}, {"role": "assistant", "content": "b"}], "too long"),
    ],
)
def test_other_conversations_are_counted_by_reason(tmp_path, empty_yaml, messages, reason):
    write_chats(tmp_path / "chats.jsonl", [])
    rows = [{"messages": [{"role": role, "content": text} for role, text in conversation(i)]} for i in range(30)]
    chats = tmp_path / "all.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": messages}]))
    assert prepared(tmp_path, "qwen", empty_yaml, f"source.path={chats}") == 0
    dropped = {name for name in Manifest.read(tmp_path / "data").counts if name.startswith("dropped")}
    assert len(dropped) == 1 and reason in dropped.pop()
    if reason == "last message":
        parts = [{"type": "text", "text": "a"}]
        write_chats(chats, [])
        rows = [
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": f"{i}"}]}
            for i in range(30)
        ]
        chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert prepared(tmp_path, "qwen", empty_yaml, f"source.path={chats}", f"out={tmp_path / 'parts'}") == 0
        assert Manifest.read(tmp_path / "parts").counts == {"read": 30, "kept": 30}


def test_a_tokenizer_without_a_template_is_refused(tmp_path, empty_yaml, capsys):
    write_chats(tmp_path / "chats.jsonl", [conversation(1)] * 9)
    keys = ["source.name=text", f"source.path={tmp_path / 'chats.jsonl'}", "source.messages_key=messages"]
    rest = ["length=64", "workers=1", f"out={tmp_path / 'data'}"]
    for tokenizer in ("bytes", "characters"):
        assert main(["prepare", str(empty_yaml), *keys, f"tokenizer.name={tokenizer}", *rest]) == 1
        assert "source.chat_template" in capsys.readouterr().err and not (tmp_path / "data").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "policy", "padding", "loss_per"),
    [("llada", "eos", "batch", "sample"), ("qwen", "ignore", "sample", "token")],
)
def test_from_messages_to_an_evaluated_model(tmp_path, empty_yaml, capsys, kind, policy, padding, loss_per):
    assert prepared(tmp_path, kind, empty_yaml, f"pad_policy={policy}") == 0
    data, export = tmp_path / "data", tmp_path / "export"
    rest = [f"data.path={data}", "train.steps=2", f"train.padding={padding}", f"train.loss_per={loss_per}"]
    rest += ["train.validate_every=2", "train.validation_samples=8", "train.pad_multiple=8"]
    small = ["train.global_batch_size=16", "train.micro_batch_size=4"]
    assert main(["train", str(empty_yaml), f"run_dir={tmp_path / 'base'}", *TINY, *rest, *small]) == 0
    adapt = [f"base={tmp_path / 'base'}", f"run_dir={tmp_path / 'run'}", *ADAPTED, *rest, *small]
    assert main(["adapt", str(empty_yaml), *adapt]) == 0
    assert main(["export", str(tmp_path / "run"), str(export)]) == 0
    tokenizer = load_tokenizer(export / "tokenizer.json")

    def sampled(*keys):
        out = tmp_path / "samples.jsonl"
        assert main(["sample", str(export), "num=2", "sampler.steps=4", "gen_length=6", f"out={out}", *keys]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    question = SPELLED.format(3)
    prompt = tokenizer.chat.encode_prompt([Turn("user", question)])
    for row in sampled(f"prompt={question}"):
        assert row["tokens"][: len(prompt)] == prompt and len(row["tokens"]) == len(prompt) + 6
        ends = np.flatnonzero(np.isin(row["tokens"][len(prompt) :], tokenizer.end_ids))
        answer = row["tokens"][len(prompt) :][: ends[0] if len(ends) else 6]
        assert row["text"] == tokenizer._tokenizer.decode(answer, skip_special_tokens=False)
    write_chats(tmp_path / "asked.jsonl", [[("user", "a"), ("assistant", "b"), ("user", f"c{i}" * i)] for i in (1, 2)])
    rows = sampled(f"messages={tmp_path / 'asked.jsonl'}")
    asked = [[Turn("user", "a"), Turn("assistant", "b"), Turn("user", f"c{i}" * i)] for i in (1, 1, 2, 2)]
    for row, turns in zip(rows, asked, strict=True):
        ids = tokenizer.chat.encode_prompt(turns)
        assert row["tokens"][: len(ids)] == ids
    capsys.readouterr()
    assert main(["sample", str(export), "num=1"]) == 1
    write_chats(tmp_path / "asked.jsonl", [conversation(1)])
    assert main(["sample", str(export), f"messages={tmp_path / 'asked.jsonl'}"]) == 1
    assert "asked.jsonl" in capsys.readouterr().err
    out = tmp_path / "found.json"
    keys = ["num=6", "seeds=[0]", "nelbo_samples=8", "sampler.steps=2", f"out={out}"]
    assert main(["evaluate", str(tmp_path / "run"), *keys]) == 0
    found = json.loads(out.read_text())
    assert found["domain"] == "responses" and found["samples"][0]["metrics"]["num_samples"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["length", "batch", "sample"])
def test_padding_is_evaluated_as_it_was_trained(tmp_path, empty_yaml, trained):
    """With lengths of their own the sequences have fewer padding tokens, and the samples end sooner."""
    assert prepared(tmp_path, "llada", empty_yaml, "pad_policy=eos") == 0
    run, out = tmp_path / "run", tmp_path / "found.json"
    keys = [f"run_dir={run}", f"data.path={tmp_path / 'data'}", *TINY, "train.steps=2", "train.global_batch_size=8"]
    keys += ["train.micro_batch_size=8", f"train.padding={trained}"]
    keys += [] if trained == "length" else ["train.pad_multiple=8"]
    assert main(["train", str(empty_yaml), *keys]) == 0

    def evaluated(*more):
        common = ["num=4", "nelbo_samples=8", "nelbo_draws=1", "sampler.steps=2", f"out={out}"]
        assert main(["evaluate", str(run), *common, *more]) == 0
        found = json.loads(out.read_text())
        computed = {row["computed_evaluations"] for row in found["samples"]}
        whole = trained == "length" if not more else more == ("padding=length",)
        assert all(0 < number <= 2 for number in computed) if whole else computed == {None}
        return found["nelbo"]["null"]["tokens"]

    default, own, whole = evaluated(), evaluated("padding=sample", "pad_multiple=8"), evaluated("padding=length")
    assert own < whole and default == (whole if trained == "length" else own)
    assert evaluated("padding=sample", "pad_multiple=1") < own
    assert evaluated("gen_length=3") == default
    assert main(["evaluate", str(run), "padding=length", "pad_multiple=8", f"out={tmp_path / 'none.json'}"]) == 1
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_a_published_model_of_conversations(tmp_path, empty_yaml):
    """Imported with its template, adapted on data that are prepared with its tokenizer, and asked."""
    there, base = tmp_path / "there", tmp_path / "base"
    config = {**PUBLISHED["llada"], "vocab_size": 262, "embedding_size": 264, "mask_token_id": 258}
    write_published(there, "llada", config, rows=264)
    write_chat_tokenizer(there, "llada")
    (there / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 256 + 5]}))
    assert main(["import", str(there), str(base), f"length={LENGTH}", "framing=chats", "bos_policy=given"]) == 0
    assert (
        prepared(tmp_path, "llada", empty_yaml, f"tokenizer.path={base / 'tokenizer.json'}", "pad_policy=ignore") == 0
    )
    run = tmp_path / "run"
    keys = [f"base={base}", f"run_dir={run}", f"data.path={tmp_path / 'data'}", *ADAPTED, "train.steps=2"]
    assert main(["adapt", str(empty_yaml), *keys, "train.global_batch_size=8", "train.micro_batch_size=8"]) == 0
    out = tmp_path / "samples.jsonl"
    for model in (base, run):
        sample = ["num=2", "sampler.steps=4", "gen_length=6", "prompt=hello <|eot_id|>", f"out={out}"]
        assert main(["sample", str(model), *sample]) == 0
        tokenizer = load_tokenizer(base / "tokenizer.json")
        assert tokenizer.end_ids == (257, 261)
        prompt = tokenizer.chat.encode_prompt([Turn("user", "hello <|eot_id|>")])
        for line in out.read_text().splitlines():
            assert json.loads(line)["tokens"][: len(prompt)] == prompt
