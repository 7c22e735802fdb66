"""MOSES, SMILES files and SELFIES: published splits, parts, what is left out."""

import gzip
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem

import data_prep.tables
import data_prep.text_files
from data_prep.moses import PUBLISHED_SPLITS, MosesSource, read_smiles
from data_prep.qm9 import Qm9Source
from data_prep.smiles import SmilesSource, SmilesSourceConfig, canonical_smiles
from scmdm.cli import main
from scmdm.config.preparation import SourceConfig
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import Tally
from scmdm.data.tokenizers import SelfiesTokenizer, UnknownSymbol, load_tokenizer
from scmdm.data.verification import verify_dataset
from scmdm.errors import UserError
from tests.conftest import prepare_qm9
from tests.data.preparation.test_prepare import decoded
from tests.data.sets import split_of

# Of MOSES: its first lines.
TRAIN = [
    "CCCS(=O)c1ccc2[nH]c(=NC(=O)OC)[nH]c2c1",
    "CC(C)(C)C(=O)C(Oc1ccc(Cl)cc1)n1ccnc1",
    "CC1C2CCC(C2)C1CN(CCO)C(=O)c1ccc(Cl)cc1",
    "Cc1c(Cl)cccc1Nc1ncccc1C(=O)OCC(O)CO",
    "Cn1cnc2c1c(=O)n(CC(O)CO)c(=O)n2C",
    "CC1Oc2ccc(Cl)cc2N(CC(O)CO)C1=O",
    "CCOC(=O)c1cncn1C1CCCc2ccccc21",
    "COc1ccccc1OC(=O)c1ccccc1OC(C)=O",
    "O=C1Nc2ccc(Cl)cc2C(c2ccccc2Cl)=NC1O",
]
KEYS = ["tokenizer.name=smiles", "length=64", "validation_fraction=0.3", "test_fraction=0.3", "workers=1"]


def many(count, prefix):
    """Different molecules."""
    return [f"{prefix}{'C' * (n // 10)}{'NO'[n % 2]}{'C' * (n % 10 + 1)}O" for n in range(count)]


@pytest.fixture
def moses(tmp_path, monkeypatch):
    """A folder as `moses_folder` makes it."""
    folder = tmp_path / "moses"
    folder.mkdir()
    test = [*many(20, "S"), TRAIN[0]]
    for split, molecules in (("train", [*TRAIN, *many(80, "F")]), ("test", test), ("test_scaffolds", many(20, "Cl"))):
        (folder / f"{split}.csv").write_text("SMILES\n" + "\n".join(molecules) + "\n")
    monkeypatch.setattr("data_prep.moses.moses_folder", lambda: folder)
    return MosesSource(SourceConfig(), length=64)


def contents(source, part_bytes):
    parts = source.parts(part_bytes)
    assert all(part.slices for part in parts)
    return [(part.split, record.content) for part in parts for record in source.records(part, Tally())]


@pytest.mark.parametrize("part_bytes", [1, 7, 50, 1000, 1 << 30])
def test_parts_of_moses_hold_every_line_once_in_its_split(moses, part_bytes):
    found = contents(moses, part_bytes)
    assert found == contents(moses, 1 << 30) and Counter(split for split, _ in found) == {
        "train": 89,
        "test": 21,
        "test_scaffolds": 20,
    }
    assert [content for _, content in found[:9]] == TRAIN


def test_published_splits_stand_and_validation_comes_out_of_train(moses, tmp_path, empty_yaml):
    out = tmp_path / "data"
    assert main(["prepare", str(empty_yaml), "source.name=moses", f"out={out}", *KEYS, "test_fraction=0.05"]) == 0
    manifest = Manifest.read(out)
    assert list(manifest.splits) == ["train", "validation", "test", "test_scaffolds"]
    texts = {split: decoded(out, split) for split in manifest.splits}
    published = [*TRAIN, *many(80, "F")]
    assert sorted(texts["train"] + texts["validation"]) == sorted(published)
    drawn = {split: [text for text in published if split_of(text, 0.3, 0.0) == split] for split in texts}
    assert texts["train"] == drawn["train"] and texts["validation"] == drawn["validation"]
    assert texts["test"] == many(20, "S"), "what is in train, too, is not tested on"
    assert texts["test_scaffolds"] == many(20, "Cl")
    assert not verify_dataset(out)


def test_a_missing_file_of_moses_is_named(moses):
    (moses.folder / "test.csv").unlink()
    with pytest.raises(UserError, match=r"test\.csv is missing; remove"):
        moses.parts(1 << 20)


def test_a_damaged_file_of_moses_is_counted(moses):
    (moses.folder / "test.csv").write_bytes(gzip.compress(b"SMILES\nCCO\n"))
    tally = Tally()
    for part in moses.parts(1 << 30):
        list(moses.records(part, tally))
    assert tally.counts == {"read": 109, "dropped: binary file": 1}


def test_a_row_of_qm9_that_is_no_row_is_counted(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for part in (1, 2, 3):
        (tmp_path / "data" / f"qm9_part{part}.csv").write_text("index,SMILES\n1,C\n2,CC,more\n")
    monkeypatch.setattr("data_prep.qm9.package_folder", lambda *_: tmp_path)
    source, tally = Qm9Source(SourceConfig(), length=64), Tally()
    found = [record.content for part in source.parts(1 << 30) for record in source.records(part, tally)]
    assert found == ["C"] * 3 and tally.counts == {"read": 6, "dropped: more fields than the header": 3}


@pytest.mark.slow
def test_moses_comes_from_its_package():
    counts = {split: len(read_smiles(split)) for split in PUBLISHED_SPLITS}
    assert counts == {"train": 1_584_663, "test": 176_074, "test_scaffolds": 176_225}
    source = MosesSource(SourceConfig(), length=64)
    parts = source.parts(16 << 20)
    assert Counter(part.split for part in parts) == {"train": 4, "test": 1, "test_scaffolds": 1}
    records = [record.content for part in parts for record in source.records(part, Tally()) if part.split == "train"]
    assert records == read_smiles("train")


@pytest.fixture
def folder(tmp_path):
    """Two spellings of ethanol, benzene in three files, and what is no molecule."""
    folder = tmp_path / "files"
    (folder / "more").mkdir(parents=True)
    (folder / "a.smi").write_text("OCC ethanol\nC1=CC=CC=C1\tbenzene\n\nC(C\nC1CC broken\n")
    (folder / "b.csv").write_text('\ufeffid,SMILES,note\n1,c1ccccc1,"a, b"\n2,CCO,\n3\n4,,none\n5,CC(=O)O,"""acid"""\n')
    (folder / "more" / "c.tsv").write_bytes(b"SMILES\tname\r\nCCN\tethylamine\r\nxyz\tnothing\r\n\xff\xfe\tbytes\r\n")
    (folder / "notes.txt").write_text("CCCCC\n")
    return folder


@pytest.mark.parametrize("part_bytes", [1, 5, 40, 1 << 30])
def test_smiles_files_are_read_whole_in_canonical_form(folder, part_bytes):
    source, tally = SmilesSource(SmilesSourceConfig(path=str(folder)), length=64), Tally()
    found = [record.content for part in source.parts(part_bytes) for record in source.records(part, tally)]
    assert found == ["CCO", "c1ccccc1", "c1ccccc1", "CCO", "CC(=O)O", "CCN"]
    assert tally.counts == {
        "read": 12,
        "dropped: not a molecule": 4,
        "dropped: no such column in the row": 1,
        "dropped: not UTF-8": 1,
    }


def test_smiles_files_end_to_end(tmp_path, empty_yaml, capsys):
    path = tmp_path / "mine.csv"
    spellings = [Chem.MolToSmiles(Chem.MolFromSmiles(text), canonical=False) for text in many(100, "F")]
    path.write_text("name,structure\n" + "\n".join(f"m{n},{text}" for n, text in enumerate([*spellings, "FCO", "C("])))
    keys = [*KEYS, "source.name=smiles", f"source.path={path}", f"out={tmp_path / 'data'}"]
    assert main(["prepare", str(empty_yaml), *keys]) == 1
    assert "source.column=SMILES is not in the header" in capsys.readouterr().err
    assert main(["prepare", str(empty_yaml), *keys, "source.column=structure"]) == 0
    texts = [text for split in ("train", "validation", "test") for text in decoded(tmp_path / "data", split)]
    assert sorted(texts) == sorted({canonical_smiles(text) for text in [*spellings, "FCO"]})
    refusing = ["source.column=structure", "on_dirty=refuse", f"out={tmp_path / 'other'}"]
    assert main(["prepare", str(empty_yaml), *keys, *refusing]) == 1
    assert "at byte" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["source.name=smiles"], "key `source.path` is not set"),
        (["source.name=smiles", "source.path=/nonexistent/x.smi"], "does not exist"),
        (["source.name=smiles", "source.path={empty}"], "holds no .smi"),
        (["source.name=moses", "source.path={empty}"], "unknown key `source.path`"),
        (["source.name=moses", "tokenizer.name=characters"], "smiles, selfies with source.name=moses"),
    ],
)
def test_mistakes_are_named(tmp_path, empty_yaml, capsys, keys, message):
    (tmp_path / "empty").mkdir()
    keys = [key.format(empty=tmp_path / "empty") for key in keys]
    assert main(["prepare", str(empty_yaml), f"out={tmp_path / 'out'}", *KEYS, *keys]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_canonical_smiles():
    assert canonical_smiles("OCC") == canonical_smiles("C(C)O") == "CCO"
    assert canonical_smiles("") is None and canonical_smiles("C(C)(C)(C)(C)C") is None


def selfies_tokenizer(molecules):
    return SelfiesTokenizer(sorted({symbol for text in molecules for symbol in SelfiesTokenizer.split(text)}))


def test_selfies_encode_and_decode_to_the_same_smiles(tmp_path):
    molecules = [canonical_smiles(text) for text in [*TRAIN, "C[C@H](O)F", "F/C=C/F", "O=[N+]([O-])C", "C.[Na+].[Cl-]"]]
    tokenizer = load_tokenizer(selfies_tokenizer(molecules).save(tmp_path))
    assert tokenizer.kind == "selfies"
    for text in molecules:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, 5, tokenizer.pad_id]) == text
        assert "".join(tokenizer.tokens(ids)).startswith("[")


@pytest.mark.parametrize("text", ["C*", "", "C(", "C(C)(C)(C)(C)C", "no SMILES"])
def test_what_has_no_selfies_is_refused(text):
    with pytest.raises(UnknownSymbol, match="has no SELFIES"):
        SelfiesTokenizer.split(text)
    with pytest.raises(UnknownSymbol):
        selfies_tokenizer(TRAIN).encode("[Cu]")


@settings(max_examples=200)
@given(st.data())
def test_any_sequence_of_selfies_symbols_is_a_molecule(data):
    """What SELFIES is for: whatever a model samples, RDKit reads."""
    tokenizer = selfies_tokenizer(TRAIN)
    ids = data.draw(st.lists(st.integers(4, tokenizer.vocab_size - 1), max_size=40))
    text = tokenizer.decode(ids)
    assert Chem.MolFromSmiles(text) is not None
    assert text == (canonical_smiles(text) or "")


@pytest.mark.slow
def test_qm9_as_selfies_is_the_same_molecules(molecules, tmp_path):
    assert prepare_qm9(tmp_path / "selfies", "tokenizer.name=selfies", "length=32") == 0
    manifest = Manifest.read(tmp_path / "selfies")
    assert manifest.tokenizer.kind == "selfies" and manifest.counts["kept"] == 900
    for split in manifest.splits:
        assert decoded(tmp_path / "selfies", split) == decoded(molecules, split)


def test_an_over_long_row_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep.text_files, "LONGEST", 100_000)
    monkeypatch.setattr(data_prep.tables, "LONGEST", 100_000)
    (tmp_path / "a.csv").write_text("SMILES,note\nCCO,\nCCC," + "x" * 200_000 + "\nCCN,\n")
    source, tally = SmilesSource(SmilesSourceConfig(path=str(tmp_path)), length=64), Tally()
    found = [record.content for part in source.parts(1 << 40) for record in source.records(part, tally)]
    assert found == ["CCO", "CCN"]
    assert tally.counts["dropped: over-long row"] == 1


def test_a_table_of_comments_alone_is_counted(tmp_path):
    (tmp_path / "a.csv").write_text("# one\n# two\n" * 9)
    source = SmilesSource(SmilesSourceConfig(path=str(tmp_path)), length=64)
    for part_bytes in (20, 1 << 20):
        tally = Tally()
        assert not [record for part in source.parts(part_bytes) for record in source.records(part, tally)]
        assert tally.counts == {"dropped: no header": 1}
