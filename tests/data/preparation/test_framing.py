"""Framings: what becomes of records, token by token; nothing is lost or doubled; what is held out."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmdm.cli import main
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.framing import FRAMERS
from scmdm.data.tokenizers import CharacterTokenizer, block_text, is_block
from scmdm.data.verification import verify_dataset
from tests.data.preparation.test_prepare import decoded

TOKENIZER = CharacterTokenizer("abcdefgh")  # ids 4 to 11
RECORDS = st.lists(st.lists(st.integers(4, 11), min_size=1, max_size=30), min_size=1, max_size=40)


def framed(kind, records, length):
    framer = FRAMERS[kind](length, TOKENIZER)
    rows = [row for ids in records for row in framer.add(ids, None)]
    return [*rows, *framer.finish()], framer.dropped


def test_by_hand():
    records = [[4, 5], [6], [7, 8, 9]]
    assert [row.ids for row in framed("records", records, 4)[0]] == [[1, 4, 5, 2], [1, 6, 2], [1, 7, 8, 2], [1, 9, 2]]
    blocks, dropped = framed("concatenate", records, 6)
    assert [row.ids for row in blocks] == [[1, 4, 5, 2, 6, 2], [1, 2, 7, 8, 9, 2]] and dropped == 1
    packed, _ = framed("packed", records, 8)
    assert [(row.ids, row.documents) for row in packed] == [
        ([1, 4, 5, 2, 1, 6, 2], [0, 0, 0, 0, 1, 1, 1]),
        ([1, 7, 8, 9, 2], [0] * 5),
    ]


@given(RECORDS, st.integers(4, 20))
def test_concatenated_blocks_are_the_stream(records, length):
    rows, dropped = framed("concatenate", records, length)
    stream = [i for ids in records for i in [*ids, 2]]
    assert all(len(row.ids) == length and row.ids[0] == 1 and row.ids[-1] == 2 for row in rows)
    assert [i for row in rows for i in row.ids[1:-1]] == stream[: len(stream) - dropped] and dropped < length - 2


@given(RECORDS, st.integers(4, 20))
def test_packed_samples_hold_every_record_once_and_whole(records, length):
    rows, dropped = framed("packed", records, length)
    assert dropped == 0 and all(len(row.ids) == len(row.documents) <= length for row in rows)
    documents = []
    for row in rows:
        numbers = np.array(row.documents)
        assert numbers[0] == 0 and set(np.diff(numbers)) <= {0, 1}
        documents += [tuple(np.array(row.ids)[numbers == number].tolist()) for number in range(numbers[-1] + 1)]
    alone, _ = framed("records", records, length)
    assert sorted(documents) == sorted(tuple(row.ids) for row in alone)


def test_packing_closes_the_fullest_when_too_many_are_open():
    records = [[4] * 8] * 300
    rows, _ = framed("packed", records, 12)
    assert len(rows) == 300
    rows, _ = framed("packed", [[4] * 8, [5] * 2] * 300, 14)
    assert len(rows) == 300 and all(len(row.ids) == 14 for row in rows)


def test_blocks_as_text():
    a, b, c = TOKENIZER.encode("abc")
    assert block_text([1, a, b, 2, c, a, 2], TOKENIZER) == "ab[EOS]ca"
    assert block_text([1, 2, a, 2], TOKENIZER) == "[EOS]a", "a block may begin with the end of a document"
    assert is_block([1, a, 2, c, 2], TOKENIZER)
    for ids in ([a, 2, c, 2], [1, a, 2, c], [1, a, 3, 2], [1, a, 1, 2], []):
        assert not is_block(ids, TOKENIZER)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    texts = [f"{number:04} " + "word " * (number % 40) for number in range(4000)]
    path.write_text("".join(json.dumps({"text": text + "x" * 400}) + "\n" for text in texts))
    return path


def prepared(corpus, out, empty_yaml, *keys):
    options = [
        f"source.path={corpus}",
        f"out={out}",
        "source.name=text",
        "source.unit=documents",
        "part_mb=1",
        "workers=1",
    ]
    assert main(["prepare", str(empty_yaml), "tokenizer.name=bytes", "length=128", *options, *keys]) == 0
    assert not verify_dataset(out)
    return Manifest.read(out)


def test_the_last_records_of_the_corpus_are_held_out(corpus, tmp_path, empty_yaml):
    """The corpus has two parts: numbers count through them."""
    manifest = prepared(corpus, tmp_path / "a", empty_yaml, "held_out_last=700", "framing=records")
    assert list(manifest.splits) == ["train", "validation"]
    numbers = {
        split: {int(text[:4]) for text in decoded(tmp_path / "a", split) if text[:4].isdigit()}
        for split in manifest.splits
    }
    assert numbers["validation"] == set(range(3300, 4000)) and numbers["train"] == set(range(3300))


def test_holding_out_everything_is_refused(corpus, tmp_path, empty_yaml, capsys):
    options = [
        f"source.path={corpus}",
        f"out={tmp_path / 'a'}",
        "source.name=text",
        "tokenizer.name=bytes",
        "length=64",
    ]
    assert main(["prepare", str(empty_yaml), *options, "held_out_last=4000", "source.unit=documents"]) == 1
    assert "held_out_last=4000, but the corpus has 4000 records" in capsys.readouterr().err


def test_concatenated_data_has_no_padding_and_counts_what_is_left(corpus, tmp_path, empty_yaml):
    manifest = prepared(corpus, tmp_path / "a", empty_yaml, "framing=concatenate", "held_out_last=100")
    assert manifest.framing == "concatenate" and 0 < manifest.counts["tokens left over"] < 126 * 4
    ids_NL = np.concatenate([read_split(tmp_path / "a", split) for split in ("train", "validation")])
    assert not (ids_NL == manifest.pad_id).any() and (ids_NL[:, 0] == 1).all() and (ids_NL[:, -1] == 2).all()
    stream = sum(len(json.loads(line)["text"].encode()) + 1 for line in corpus.open())
    assert len(ids_NL) * 126 + manifest.counts["tokens left over"] == stream


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["framing=concatenate", "pad_policy=ignore"], "pad_policy='ignore' is not possible; it must be loss"),
        (["framing=concatenate", "pad_policy=masked"], "pad_policy='masked' is not possible; it must be loss"),
        (["framing=packed", "pad_policy=masked"], "pad_policy='masked' is not possible; it must be ignore"),
        (["framing=packed"], "pad_policy='loss' is not possible; it must be ignore"),
        (["framing=chunks"], "framing='chunks' is not possible"),
        (["held_out_last=0"], "held_out_last=0 is not possible"),
        (["held_out_last=5", "source.split_by=names"], "null with source.split_by=names"),
        (["validation_fraction=0.0"], "validation_fraction=0.0 is not possible"),
        (["tokenizer.name=huggingface"], "key `tokenizer.path` is not set"),
        (["tokenizer.path=x"], "unknown key `tokenizer.path`"),
        (["tokenizer.name=characters", "tokenizer.path=x"], "tokenizer.path=x is not a tokenizer file of scmdm"),
    ],
)
def test_what_does_not_go_together(corpus, tmp_path, empty_yaml, capsys, keys, message):
    options = [
        "source.name=text",
        f"source.path={corpus}",
        f"out={tmp_path / 'a'}",
        "tokenizer.name=bytes",
        "length=64",
    ]
    assert main(["prepare", str(empty_yaml), *options, *keys]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("keys", [["framing=packed", "pad_policy=ignore"], ["framing=concatenate"]], ids=str)
@pytest.mark.parametrize(
    "source",
    [
        ["source.name=digits", "tokenizer.name=levels", "length=65"],
        ["source.name=genomes", "tokenizer.name=dna", "length=34", "source.species_from=file", "source.path={}"],
    ],
    ids=["grids", "labels"],
)
def test_grids_and_records_with_labels_are_not_joined(tmp_path, empty_yaml, capsys, source, keys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.fa").write_text(f">{name}\n{'ACGT' * 2000}\n")
    options = [key.format(tmp_path) for key in source]
    assert main(["prepare", str(empty_yaml), *options, *keys, f"out={tmp_path / 'a'}", "workers=1"]) == 1
    error = capsys.readouterr().err
    assert keys[0] in error and source[0] in error and "records" in error and error.count("\n") == 1


def test_data_for_a_model_that_there_is_have_its_characters(tmp_path, empty_yaml):
    (tmp_path / "one.txt").write_text("".join(f"{'abc' * i}\n" for i in range(1, 40)))
    (tmp_path / "two.txt").write_text("".join(f"{'ab' * i}\n" for i in range(1, 30)) + "abd\n")
    keys = ["source.name=text", "source.unit=lines", "deduplicate=false", "length=64", "validation_fraction=0.2"]

    def of(name, *more):
        options = [
            *keys,
            f"source.path={tmp_path / f'{name}.txt'}",
            f"out={tmp_path / name}",
            "tokenizer.name=characters",
            *more,
        ]
        assert main(["prepare", str(empty_yaml), *options]) == 0
        return Manifest.read(tmp_path / name)

    first = of("one")
    second = of("two", f"tokenizer.path={tmp_path / 'one/tokenizer.json'}")
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert second.counts["dropped: unknown symbol"] == 1 and second.counts["kept"] == 29


def test_the_end_of_a_long_record_is_cut_off_or_omitted(tmp_path, empty_yaml):
    lines = ["x" * (n % 30 + 1) for n in range(300)]
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    texts, counts = {}, {}
    for rule in ("cut", "truncate"):
        options = [f"source.path={tmp_path / 'a.txt'}", "source.name=text", "source.unit=lines", "tokenizer.name=bytes"]
        options += ["length=22", "deduplicate=false", "split_seed=0", f"long_records={rule}"]
        assert main(["prepare", str(empty_yaml), f"out={tmp_path / rule}", *options]) == 0
        counts[rule] = Manifest.read(tmp_path / rule).counts
        texts[rule] = sorted(decoded(tmp_path / rule, "train") + decoded(tmp_path / rule, "validation"))
    assert counts == {"cut": {"read": 300, "kept": 300}, "truncate": {"read": 300, "kept": 300, "truncated": 100}}
    assert texts["truncate"] == sorted(line[:20] for line in lines)
    assert texts["cut"] == sorted(part for line in lines for part in (line[:20], line[20:]) if part)


@pytest.mark.parametrize("keys", [["framing=packed", "pad_policy=ignore"], ["framing=concatenate"]], ids=str)
def test_truncation_that_would_be_ignored_is_refused(tmp_path, empty_yaml, capsys, keys):
    options = ["source.name=text", "tokenizer.name=bytes", "length=64", f"out={tmp_path / 'a'}"]
    assert main(["prepare", str(empty_yaml), *options, *keys, "long_records=truncate"]) == 1
    assert "long_records" in capsys.readouterr().err
    options = ["source.name=qm9", "tokenizer.name=smiles", "length=32", f"out={tmp_path / 'a'}"]
    assert main(["prepare", str(empty_yaml), *options, "long_records=truncate"]) == 1
    assert "long_records" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", [0.05, 0.013])
def test_the_permutation_of_datasets_splits_the_corpus(corpus, tmp_path, empty_yaml, fraction):
    """Records of two parts, none dropped: those that `train_test_split` of the package datasets holds out."""
    options = ["split_seed=42", f"validation_fraction={fraction}", "framing=records"]
    manifest = prepared(corpus, tmp_path / "a", empty_yaml, *options)
    held_out = np.random.default_rng(42).permutation(4000)[: math.ceil(fraction * 4000)].tolist()
    assert list(manifest.splits) == ["train", "validation"]
    texts = decoded(tmp_path / "a", "validation")
    assert {int(text[:4]) for text in texts if text[:4].isdigit()} == set(held_out)
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"number": list(range(4000))})
    assert rows.train_test_split(test_size=fraction, seed=42)["test"]["number"] == held_out


def test_one_rule_of_positions_at_a_time(corpus, tmp_path, empty_yaml, capsys):
    options = [
        "source.name=text",
        f"source.path={corpus}",
        "tokenizer.name=bytes",
        "length=64",
        f"out={tmp_path / 'a'}",
    ]
    for other in ("held_out_last=5", "source.split_by=names"):
        assert main(["prepare", str(empty_yaml), *options, "split_seed=1", other]) == 1
        assert "split_seed=1" in capsys.readouterr().err
