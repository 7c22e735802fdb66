"""What a preparation does not understand, does not use, or would destroy is counted or refused by name."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.text import TextConfig, TextSource
from scmdm.cli import main
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import Tally
from scmdm.data.remote import LOCK_FILE
from tests.chat_tokenizers import write_chat_tokenizer
from tests.conftest import prepare_qm9
from tests.data.preparation.test_source_idx import write_mnist

PROMPTS = ("source.prompt_key=q", "source.response_key=a")
CHATS = ("source.messages_key=messages", "source.chat_template=none")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(number=0, **more):
    return [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": f"answer {number}", **more}]


def prepared(place, empty_yaml, *keys):
    base = ["source.name=text", "tokenizer.name=bytes", "length=64", "validation_fraction=0.2", "test_fraction=0.2"]
    return main(["prepare", str(empty_yaml), *base, "workers=1", f"out={place / 'data'}", *keys])


def refused(capsys, *named):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(name in error for name in named), error


@pytest.mark.parametrize("keys", [PROMPTS, CHATS, "template"])
def test_files_without_rows_are_skipped_in_a_folder_and_refused_alone(tmp_path, empty_yaml, capsys, keys):
    if keys == "template":
        keys = ("source.messages_key=messages", "tokenizer.name=huggingface")
        keys = (*keys, f"tokenizer.path={write_chat_tokenizer(tmp_path / 'tokenizer')}")
    rows = [{"q": f"ask {i}", "a": f"answer {i}", "messages": chat(i)} for i in range(40)]
    write_rows(tmp_path / "mix" / "a.jsonl", rows)
    for name in ("README.txt", "wiki.raw", "NOTES"):
        (tmp_path / "mix" / name).write_text("no row\n")
        assert prepared(tmp_path, empty_yaml, *keys, f"source.path={tmp_path / 'mix' / name}") == 1
        refused(capsys, name, ".jsonl")
    assert prepared(tmp_path, empty_yaml, *keys, f"source.path={tmp_path / 'mix'}", "source.pattern=*.txt") == 1
    refused(capsys, "README.txt")
    assert prepared(tmp_path, empty_yaml, *keys, f"source.path={tmp_path / 'mix'}", "source.format=text") == 1
    refused(capsys, "source.format=text")
    assert prepared(tmp_path, empty_yaml, *keys, f"source.path={tmp_path / 'mix'}") == 0
    assert "README.txt" in capsys.readouterr().out
    assert Manifest.read(tmp_path / "data").counts == {"read": 40, "kept": 40, "skipped: other suffix": 3}


REFUSED = [  # of the answer, and the key that is named
    ({"weight": 0}, "weight"),
    ({"train": False}, "train"),
    ({"thinking": "hm"}, "thinking"),
    ({"reasoning": "hm"}, "reasoning"),
    ({"reasoning_content": "hm"}, "reasoning_content"),
    ({"prefix": True}, "prefix"),
    ({"images": ["a.png"]}, "images"),
    ({"tool_calls": [{"id": "1"}]}, "tool_calls"),
    ({"content": [{"type": "text", "text": "answer", "image": "a.png"}]}, "image"),
]
KEPT = [
    {},
    {"weight": 1},
    {"weight": 1.0, "train": True},
    {"thinking": None, "tool_calls": [], "reasoning": "", "function_call": {}},
    {"name": "bot", "id": 3, "timestamp": "2024", "toxic": False, "hashed_ip": "x"},
    {"content": [{"type": "text", "text": "answer", "image": None}]},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("template", ["tokenizer", "none"])
def test_fields_of_messages_are_known_or_counted_by_name(tmp_path, template, suffix):
    def read(row):
        path = write_rows(tmp_path / f"a{suffix}", [row])
        source = TextSource(TextConfig(path=str(path), messages_key="messages", chat_template=template), length=64)
        tally = Tally()
        records = [record for part in source.parts(1 << 40) for record in source.records(part, tally)]
        return len(records), [reason for reason in tally.counts if reason.startswith("dropped")]

    for more in KEPT if suffix == ".jsonl" else KEPT[:3]:
        assert read({"messages": chat(**more), "tools": [], "functions": None}) == (1, [])
    for more, key in REFUSED if suffix == ".jsonl" else REFUSED[:6]:
        found, (reason,) = read({"messages": chat(**more)})
        assert found == 0 and repr(key) in reason
    for key in ("tools", "functions"):
        found, (reason,) = read({"messages": chat(), key: [{"name": "search"}]})
        assert found == 0 and key in reason
    question, answer = chat(weight=1)
    assert read({"messages": [{**question, "weight": 0, "train": False}, answer]}) == (1, [])


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (("source.path={}/a.txt", "source.text_key=body"), "source.text_key=body"),
        (("source.path={}/a.txt", "source.pattern=*.foo"), "source.pattern=*.foo"),
        (("source.pattern=*.foo",), "source.pattern=*.foo"),
        (PROMPTS, "source.response_key=a"),
        (("source.path={}/a.jsonl", *CHATS, "source.text_key=body"), "source.text_key=body"),
        (("source.path={}/a.jsonl", *PROMPTS, "source.text_key=body"), "source.text_key=body"),
        (("source.path={}/a.jsonl", *PROMPTS, "source.unit=lines"), "source.unit=lines"),
        (("source.path={}/a.jsonl", *CHATS, "source.unit=lines"), "source.unit=lines"),
        (("source.path={}/a.jsonl", "source.chat_template=none"), "source.chat_template=none"),
        (("source.path={}/a.jsonl", "source.prompt_key=q", "source.response_key=q"), "source.prompt_key='q'"),
        (("source.path={}/a.jsonl", "source.text_key=q", "held_out_last=3"), "validation_fraction=0.2"),
        (("source.path={}/a.jsonl", "source.text_key=q", "split_seed=3"), "test_fraction=0.2"),
        (("source.path={}/splits",), "test_fraction=0.2"),
        (
            ("source.name=smiles", "source.path={}/a.smi", "source.column=S", "tokenizer.name=smiles"),
            "source.column=S",
        ),
        (
            ("source.name=huggingface", "source.path=x", "source.split_by=names", "source.split=test"),
            "source.split=test",
        ),
        (("source.name=idx", "source.path={}/idx", "tokenizer.name=levels", "length=37"), "test_fraction=0.2"),
    ],
)
def test_keys_without_effect_are_refused(tmp_path, empty_yaml, capsys, keys, named):
    write_mnist(tmp_path / "idx")
    for name in ("a.txt", "splits/train.txt", "splits/test.txt", "a.smi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("CCO\n")
    write_rows(tmp_path / "a.jsonl", [{"q": "ask", "a": "answer", "messages": chat()}])
    assert prepared(tmp_path, empty_yaml, *(key.format(tmp_path) for key in keys)) == 1
    refused(capsys, named)


@pytest.mark.parametrize("header", [">", ">same"])
def test_sequences_of_one_group_are_named(tmp_path, empty_yaml, capsys, header):
    for name in ("a.fa", "b.fa"):
        (tmp_path / name).write_text("".join(f"{header}\n{'ACGT' * (3 + i)}\n" for i in range(20)))
    keys = ["source.name=genomes", "tokenizer.name=dna", "length=10", f"source.path={tmp_path}"]
    assert prepared(tmp_path, empty_yaml, *keys) == 1
    refused(capsys, "is empty", repr(f"{header[1:]}:0"))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_column_that_occurs_twice_is_named(tmp_path, empty_yaml, capsys, name):
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    assert prepared(tmp_path, empty_yaml, f"source.path={tmp_path / name}") == 1
    refused(capsys, "key text more than once")


def test_a_file_as_parent_is_refused_by_the_key(tmp_path, capsys):
    (tmp_path / "a.smi").write_text("CCO\n")
    assert prepare_qm9(tmp_path / "a.smi" / "x") == 1
    refused(capsys, f"out={tmp_path / 'a.smi' / 'x'}")
    assert os.listdir(tmp_path) == ["a.smi"]


@pytest.mark.parametrize(
    "name", ["config.yaml", "checkpoints/step-1/model.safetensors", "train/notes.txt", ".git/HEAD"]
)
def test_overwrite_removes_no_file_of_another_origin(tmp_path, capsys, name):
    root = tmp_path / "data"
    assert prepare_qm9(root, "limit=100", "compression=zstd") == 0
    read_split(root, "train")
    assert (root / LOCK_FILE).is_file()
    assert prepare_qm9(root, "limit=100", "compression=null", "overwrite=true") == 0
    for left in ("train/.fetch.x/shard.00000.mds", "train/shard.00001.mds.zstd", ".manifest.json.x.tmp"):
        (root / left).parent.mkdir(exist_ok=True)
        (root / left).touch()
    (root / "manifest.json").write_text("{damaged")
    assert prepare_qm9(root, "limit=90", "overwrite=true") == 0
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("mine")
    capsys.readouterr()
    assert prepare_qm9(root, "limit=80", "overwrite=true") == 1
    refused(capsys, str(root / name), "overwrite=true")
    assert (root / name).read_text() == "mine" and Manifest.read(root).counts["kept"] == 90
