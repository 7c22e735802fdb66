"""Proteins: letters, long sequences, the split, by way of `scmdm prepare`."""

import gzip
import random

import pytest

from data_prep.proteins import ProteinSource, ProteinSourceConfig
from scmdm.cli import main
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import SPLITS, Tally
from scmdm.data.tokenizers.symbol_tokenizer import AMINO_ACIDS
from scmdm.data.verification import verify_dataset
from tests.data.preparation.test_prepare import decoded


def read(path, length=64, **keys):
    source, tally = ProteinSource(ProteinSourceConfig(path=str(path), **keys), length), Tally()
    records = [record for part in source.parts(1 << 20) for record in source.records(part, tally)]
    return records, dict(tally.counts)


def test_letters(tmp_path):
    (tmp_path / "a.faa").write_text(
        ">one\nMKTA\nyiak*\n>two\nMBJZUOMMMM\n>three\nMK-TA\n>four\nMX\n>five\n>six\nAC*DE\n>seven\nMKLV\n"
    )
    records, counts = read(tmp_path / "a.faa", max_unknown=0.5)
    assert [record.content for record in records] == ["MKTAYIAK", "MXXXXXMMMM", "MX", "MKLV"]
    assert counts == {"read": 7, "dropped: no amino acid": 3}
    assert read(tmp_path)[1] == {"read": 7, "dropped: no amino acid": 3, "dropped: too many unknown letters": 2}


def test_long_sequences(tmp_path):
    (tmp_path / "a.fasta").write_text(">long\nMKTAYIAKQR\n>short\nMKLV\n")
    records, counts = read(tmp_path, length=6)
    assert [record.content for record in records] == ["MKTA", "YIAK", "QR", "MKLV"] and counts == {"read": 4}
    assert len({record.group for record in records[:3]}) == 1 and records[0].group and records[3].group is None
    records, counts = read(tmp_path, length=6, on_length="drop")
    assert [record.content for record in records] == ["MKLV"]
    assert counts == {"read": 2, "dropped: longer than a sample": 1}


def test_windows_of_a_protein_share_a_split(tmp_path, empty_yaml):
    """Every window of ten random letters is found in one protein only."""
    dice = random.Random(0)
    proteins = ["".join(dice.choices(AMINO_ACIDS[:20], k=dice.randint(5, 60))) for _ in range(200)]
    (tmp_path / "proteins").mkdir()
    for number, name in enumerate(("a.fa", "b.faa.gz")):
        text = "".join(f">p{n}\n{protein}\n" for n, protein in enumerate(proteins) if n % 2 == number)
        with (gzip.open if name.endswith(".gz") else open)(tmp_path / "proteins" / name, "wt") as file:
            file.write(text)
    out = tmp_path / "data"
    keys = [
        "source.name=proteins",
        f"source.path={tmp_path / 'proteins'}",
        "tokenizer.name=amino_acids",
        "length=22",
        "validation_fraction=0.2",
        "test_fraction=0.2",
        "workers=1",
    ]
    assert main(["prepare", str(empty_yaml), *keys, f"out={out}"]) == 0
    assert not verify_dataset(out)
    manifest = Manifest.read(out)
    assert manifest.tokenizer.kind == "amino_acids" and manifest.vocab_size == 25 and manifest.labels == []
    assert manifest.counts["kept"] == sum(-(-len(protein) // 20) for protein in proteins)
    split_of = {}
    for split in SPLITS:
        assert (read_split(out, split)[:, 0] == manifest.bos_id).all()
        for window in decoded(out, split):
            owners = [n for n, protein in enumerate(proteins) if window in protein]
            if len(owners) == 1:
                assert split_of.setdefault(owners[0], split) == split
    assert len(split_of) > 190 and set(split_of.values()) == set(SPLITS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["source.path=/nonexistent/proteins"], "does not exist"),
        (["source.path={}", "source.on_length=crop"], "source.on_length='crop' is not possible"),
        (
            ["source.path={}", "tokenizer.name=dna"],
            "tokenizer.name='dna' is not possible; it must be",
        ),
        (["source.path={}"], "holds no .fa, .fasta, .faa"),
    ],
)
def test_mistakes_are_named(tmp_path, empty_yaml, capsys, keys, message):
    keys = [key.format(tmp_path) for key in keys]
    base = ["source.name=proteins", "tokenizer.name=amino_acids", "length=22", f"out={tmp_path / 'data'}", "workers=1"]
    assert main(["prepare", str(empty_yaml), *base, *keys]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "data").exists()
