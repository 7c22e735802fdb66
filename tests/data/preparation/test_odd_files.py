"""Odd and damaged files of the user, for every source of text: right, counted by name, or refused in one line."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.corpus_files import find_files, kind_of, split_by_name, split_of_name, without_split
from data_prep.genomes import GenomeSource, GenomeSourceConfig, read_species_table
from data_prep.proteins import ProteinSource, ProteinSourceConfig
from data_prep.smiles import SmilesSource, SmilesSourceConfig
from data_prep.text import TextConfig, TextSource
from data_prep.text_files import TextFile
from scmdm.cli import main
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import Slice, Tally
from scmdm.errors import UserError
from scmdm.evaluation.zero_shot import read_texts
from scmdm.sampling.templates import read_prompts

LINES = [f"line {number}, caf\xe9 \u4e2d \U0001f600" for number in range(60)]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def encoded(text, encoding):
    return MARKS.get(encoding, b"") + text.encode(encoding)


def read(source, part_bytes=1 << 40):
    """Contents of the records, and what was counted."""
    tally = Tally()
    found = [record for part in source.parts(part_bytes) for record in source.records(part, tally)]
    return [record.content for record in found], dict(tally.counts), tally.places


def text(path, unit="lines", **keys):
    return TextSource(TextConfig(path=str(path), unit=unit, **keys), length=64)


def smiles(path, **keys):
    return SmilesSource(SmilesSourceConfig(path=str(path), **keys), length=64)


def genomes(path, **keys):
    return GenomeSource(GenomeSourceConfig(path=str(path), **keys), length=6)


# Encodings, marks and line ends.


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", PACK)
def test_every_encoding_line_end_and_compression_gives_the_same(tmp_path, encoding, end, suffix):
    rows = [json.dumps({"text": line}, ensure_ascii=False) for line in LINES]
    table = ["id,text", *(f'{number},"{line}"' for number, line in enumerate(LINES))]
    for name, lines in (("a.txt", LINES), ("a.JSONL", rows), ("a.csv", table)):
        path = tmp_path / f"{name}{suffix.upper()}"
        path.write_bytes(PACK[suffix](encoded(end.join(lines) + end, encoding)))
        for part_bytes in (50, 1 << 40):
            found, counts, _ = read(text(path, "documents" if name != "a.txt" else "lines"), part_bytes)
            assert found == LINES and counts == {"read": len(LINES)}, path


@given(
    st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"x", b"yy", codecs.BOM_UTF8]), max_size=30),
    st.lists(st.integers(0, 60), max_size=3),
    st.integers(1, 4),
)
def test_slices_of_lines_are_the_lines(tmp_path_factory, pieces, cuts, longest):
    raw = b"".join(pieces)
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(raw)
    file = TextFile(path)
    expected = [line.removeprefix(codecs.BOM_UTF8) for line in raw.removeprefix(codecs.BOM_UTF8).splitlines()]
    if file.is_divisible:
        bounds = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
        slices = [Slice("a.txt", *bound) for bound in pairwise(bounds)]
    else:
        slices = [Slice("a.txt")]
    assert [line.rstrip(b"\n") for piece in slices for _, line in file.lines(piece)] == expected
    short = [line.rstrip(b"\n") for piece in slices for _, line in file.lines(piece, longest=longest)]
    cut = [line[: longest + 1].removeprefix(codecs.BOM_UTF8) for line in raw.removeprefix(codecs.BOM_UTF8).splitlines()]
    assert [line[:longest] for line in short] == [line[:longest] for line in cut]


BINARY = {
    "unmarked.txt": "line of text\n".encode("utf-16-le") * 9,
    "gzip.txt": gzip.compress(b"text " * 100),
    "picture.txt": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
    "random.txt": bytes((number * 7919 + number // 256 * 31) % 256 for number in range(4000)),
    "paper.txt": b"%PDF-1.7\nplain enough\n",
    "archive.txt": b"name" + bytes(253) + b"ustar\x0000" + b"text\n" * 100,
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_is_counted_and_never_text(tmp_path, name):
    (tmp_path / name).write_bytes(BINARY[name])
    (tmp_path / "z.txt").write_text("text\n")
    found, counts, places = read(text(tmp_path))
    assert found == ["text"] and counts == {"read": 1, "dropped: binary file": 1}
    assert name in places["dropped: binary file"][0]
    for reader in (lambda: read_prompts(tmp_path / name), lambda: read_texts(tmp_path)):
        with pytest.raises(UserError, match=name):
            reader()


def test_one_bad_line_costs_no_other_one(tmp_path):
    lines = [line.encode() for line in LINES]
    lines[7], lines[20] = b"caf\xe9", b"nul\0"
    (tmp_path / "a.txt").write_bytes(b"\r".join(lines))
    found, counts, places = read(text(tmp_path))
    assert found == [line for number, line in enumerate(LINES) if number not in (7, 20)]
    assert counts == {"read": 58, "dropped: not UTF-8": 1, "dropped: NUL character": 1}
    assert "a.txt, line 8" in places["dropped: not UTF-8"][0]
    half = "one\n\ud800two\nthree\n".encode("utf-16-le", "surrogatepass")
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + half + b"x")
    found, counts, _ = read(text(tmp_path))
    assert found == ["one", "three"] and counts == {"read": 2, "dropped: not UTF-8": 2}


@pytest.mark.parametrize("raw", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
def test_empty_files_are_counted(tmp_path, raw):
    for name in ("a.txt", "a.jsonl", "a.raw", "b.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert read(text(tmp_path))[:2] == ([], {"dropped: empty file": 4})


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_joined_truncated_and_wrongly_named_streams(tmp_path, suffix):
    path, half = tmp_path / f"a.txt{suffix}", "\n".join(LINES).encode()
    path.write_bytes(PACK[suffix](half) + PACK[suffix](b"\n" + half))
    assert read(text(path))[0] == LINES * 2
    many = "\n".join(f"{number} {number * 7919 % 10007}" for number in range(60_000)).encode()
    path.write_bytes(PACK[suffix](many)[:-9])
    found, counts, _ = read(text(path))
    assert counts["dropped: damaged file"] == 1 and found == many.decode().split("\n")[: len(found)]
    path.write_bytes(b"this is not compressed\n")
    assert read(text(path))[1] == {"dropped: damaged file": 1}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("size", [1_000, (1 << 16) + 4, 200_000])
def test_streams_with_zeros_behind_them(tmp_path, suffix, size):
    """As in tape archives; also where only zeros are left for the last read."""
    path = tmp_path / f"a.txt{suffix}"
    one, two = (PACK[suffix](line).ljust(size, b"\0") for line in (b"one\n", b"two\n"))
    path.write_bytes(one)
    assert read(text(path))[:2] == (["one"], {"read": 1})
    path.write_bytes(one + two)
    assert read(text(path))[:2] == (["one", "two"], {"read": 2})


# Rows.

ROWS = {
    '{"text": 1' + "0" * 5000 + "}": "malformed JSON",
    "[" * 100_000: "malformed JSON",
    '{"text": "a", "b": NaN}': "malformed JSON",
    '{"text": "a", "text": "b"}': "malformed JSON",
    '{"text": "a"},': "malformed JSON",
    '{"text": "a"}{"text": "b"}': "malformed JSON",
    '{"text": "a': "malformed JSON",
    '{"text": "\\ud800"}': "not UTF-8",
    '{"text": "a\\u0000b"}': "NUL character",
    '{"text": null}': "no key text",
    '{"Text": "a"}': "no key text",
    '{"text": ["a"]}': "key text is not text",
    '{"text": true}': "key text is not text",
    '["a"]': "not an object",
    '"a"': "not an object",
    "null": "not an object",
    '{"text": " "}': "empty",
}


@pytest.mark.parametrize(("row", "reason"), ROWS.items(), ids=[row[:30] for row in ROWS])
def test_a_row_that_cannot_be_read_is_counted_with_its_place(tmp_path, row, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n' + row + '\n{"text": "last"}\n')
    found, counts, places = read(text(path, "documents"))
    assert found == ["first", "last"] and counts == {"read": 2, f"dropped: {reason}": 1}
    assert "a.jsonl at byte 18" in places[f"dropped: {reason}"][0]
    if reason != "empty":
        with pytest.raises(UserError, match=r"a\.jsonl at byte 18"):
            read_texts(path)
        path.write_text(path.read_text().replace('"text"', '"prompt"'))
        if reason != "no key text" or "null" in row:
            with pytest.raises(UserError, match=r"a\.jsonl at byte 2"):
                read_prompts(path)


@given(st.lists(st.binary(max_size=40) | st.sampled_from([row.encode() for row in list(ROWS)[2:]]), max_size=6))
def test_any_lines_are_read_or_counted(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    raw = b'{"text": "kept"}\n' * 30 + b"\n".join(lines)
    path.write_bytes(raw)
    found, counts, _ = read(text(path, "documents"))
    if counts.get("dropped: binary file"):
        return
    assert found[:30] == ["kept"] * 30
    dropped = sum(count for name, count in counts.items() if name.startswith("dropped"))
    filled = [line for line in raw.splitlines() if line.removeprefix(codecs.BOM_UTF8).strip()]
    assert len(found) + dropped == len(filled)


def test_the_keys_that_there_are_and_the_way_to_read_a_chat_are_named(tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well met"}]
    rows = [chat, [{"role": "system", "content": "x"}, *chat], chat[:1], "chat", [{"role": "user"}, chat[1]]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": 1, "messages": row}) + "\n" for row in rows))
    _, counts, places = read(text(path))
    assert counts == {"dropped: no key text": 5}
    assert (
        "'id', 'messages'" in places["dropped: no key text"][0] and "messages_key" in places["dropped: no key text"][0]
    )
    source, tally = text(path, messages_key="messages", chat_template="none"), Tally()
    (record,) = [record for part in source.parts(1 << 40) for record in source.records(part, tally)]
    assert (record.prompt, record.content) == ("hello", "well met")
    assert sum(count for name, count in tally.counts.items() if name.startswith("dropped")) == 4
    assert TextConfig(messages_key="messages", chat_template="none").framing == "prompts"


def test_parquet_of_other_types(tmp_path):
    path = tmp_path / "a.parquet"
    for column, reason in (
        ([b"a", b"b"], "key text is not text"),
        ([["a"], ["b"]], "key text is not text"),
        ([None, None], "no key text"),
        ([{"role": "user"}, None], "key text is not text"),
    ):
        pq.write_table(pa.table({"text": column}), path)
        found, counts, _ = read(text(path))
        assert found == [] and counts[f"dropped: {reason}"] >= 1 and sum(counts.values()) == 2
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    assert read(text(path))[1] == {"dropped: key text more than once": 1}


def test_every_flipped_byte_of_a_parquet_file_is_read_or_counted(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"]}), path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        found, counts, *_ = read(text(path))
        # A page has no checksum: a flipped letter is another letter, but no row is lost without a count.
        assert len(found) == 2 or any(name.startswith("dropped: ") for name in counts), at


# Tables.


@given(
    st.lists(st.tuples(*[st.text("a,;\"\n'# \t\xe9", max_size=8)] * 2), max_size=6),
    st.sampled_from([",", ";", "\t"]),
    st.integers(1, 40),
)
def test_tables_are_read_as_the_csv_module_writes_them(tmp_path_factory, rows, delimiter, part_bytes):
    path, buffer = tmp_path_factory.mktemp("table") / "a.csv", io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\n")
    writer.writerows([("text", "note"), *rows])
    path.write_bytes(buffer.getvalue().encode())
    found, counts, _ = read(text(path, "documents"), part_bytes)
    values = [value for value, _ in rows]
    assert found == [value for value in values if value.strip()]
    assert sum(counts.values()) == len(values)


def test_tables_with_comments_ragged_rows_and_open_quotes(tmp_path):
    path = tmp_path / "a.csv"
    rows = ["# made by hand", "", "name,SMILES", "a,CCO", 'b,"CCN', "c,CCC", "d", "e,CCS,x", '"f, or\ng",CCCl', "h,CO"]
    path.write_text("\n".join(rows))
    for part_bytes in (5, 1 << 40):
        found, counts, places = read(smiles(path), part_bytes)
        assert found == ["CCO", "CCC", "CCCl", "CO"]
        assert counts == {
            "read": 7,
            "dropped: malformed row": 1,
            "dropped: no such column in the row": 1,
            "dropped: more fields than the header": 1,
        }
        assert f"at byte {path.read_text().index('b,')}" in places["dropped: malformed row"][0]


def test_joined_files_with_marks_and_headers(tmp_path):
    mark = "\ufeff"
    for name, part in (("a.txt", "{}\n"), ("a.jsonl", '{{"text": "{}"}}\n'), ("a.csv", "id,text\n1,{}\n")):
        path = tmp_path / name
        path.write_text("".join(mark + part.format(word) for word in ("one", "two", "three")))
        for part_bytes in (5, 1 << 40):
            found, counts, _ = read(text(path), part_bytes)
            assert found == ["one", "two", "three"]
            assert counts == {"read": 3} | ({"dropped: repeated header": 2} if name == "a.csv" else {})


@pytest.mark.parametrize("delimiter", ",;\t")
def test_tables_that_name_their_delimiter_first(tmp_path, delimiter):
    path = tmp_path / "a.csv"
    path.write_text(f"sep={delimiter}\r\nid{delimiter}SMILES\r\n1{delimiter}CCO\r\n")
    assert read(smiles(path))[:2] == (["CCO"], {"read": 1})


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.tsv", "a.csv.gz", "a.tsv.zst", "a.smi.gz", "a.SMILES", "a.txt"])
def test_molecules_of_any_name(tmp_path, name):
    delimiter = "\t" if "tsv" in name else ";"
    table = kind_of(name).format in ("csv", "tsv")
    raw = f"#id{delimiter}SMILES\n1{delimiter}CCO\n" if table else "# comment\nCCO ethanol\n"
    (tmp_path / name).write_bytes(
        PACK[f".{name.rsplit('.', 1)[1]}" if name.endswith(("gz", "zst")) else ""](raw.encode())
    )
    assert read(smiles(tmp_path / name))[:2] == (["CCO"], {"read": 1})
    if name != "a.txt":
        assert read(smiles(tmp_path))[0] == ["CCO"]


def test_a_column_that_is_missing_or_stands_twice_is_refused(tmp_path):
    for header in ("smiles,id", "SMILES,SMILES"):
        (tmp_path / "a.csv").write_text(f"{header}\nCC,CO\n")
        with pytest.raises(UserError, match=r"source\.column=SMILES.*a\.csv"):
            smiles(tmp_path).parts(100)


# FASTA and its tables.


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_fasta_with_marks_comments_and_any_line_end(tmp_path, encoding, end):
    lines = ["; old style", ">s1 x", "ACGT", "", "; between", "acgt", ">s2", "AC\tGT", ">s3"]
    table = ["# name", "s1\ta", "s2\tb", "", "s3\tc"]
    path, species = tmp_path / "a.FASTA", tmp_path / "species.tsv"
    path.write_bytes(encoded(end.join(lines), encoding))
    species.write_bytes(encoded(end.join(table) + end, encoding))
    for part_bytes in (4, 1 << 40):
        found, counts, _ = read(genomes(path, species_table=str(species)), part_bytes)
        assert found == ["ACGT", "ACGT", "ACGT"]
        assert counts == {"read": 3, "dropped: sequence shorter than a window": 1}
    assert read_species_table(species) == {"s1": "a", "s2": "b", "s3": "c"}
    proteins = ProteinSource(ProteinSourceConfig(path=str(path)), length=20)
    assert read(proteins)[0] == ["ACGTACGT", "ACGT"]


def test_zero_shot_texts_need_no_splits(tmp_path):
    for name in ("train/a.txt", "test/b.txt", "README.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(read_texts(tmp_path)) == ["README.txt", "test/b.txt", "train/a.txt"]


def test_letters_outside_of_fasta_sequences_are_counted(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text("\ufeff;LCBO\n; old style\nGGGG\n>s1\nACGT\n\ufeff>s2\nTTTT\n  >s3\nCCCC\n")
    for part_bytes in (4, 1 << 40):
        found, counts, places = read(genomes(path), part_bytes)
        assert found == ["ACGT", "TTTT", "CCCC"] and counts == {"read": 3, "dropped: not FASTA": 1}
        assert str(path) in places["dropped: not FASTA"][0]


@pytest.mark.parametrize("suffix", PACK)
def test_fasta_of_any_compression(tmp_path, suffix):
    (tmp_path / f"a.fa{suffix}").write_bytes(PACK[suffix](b">s\n" + b"ACGT" * 60_000 + b"\n" + b"ACGT" * 10))
    assert len(read(genomes(tmp_path))[0]) == 60_010


# Folders, names and splits.


def test_hidden_files_links_and_devices_are_skipped_and_counted(tmp_path, empty_yaml, capsys):
    folder = tmp_path / "texts"
    for name in (".git/x.txt", ".x.txt", "._a.txt", "__MACOSX/y.txt", "sub/a.txt", "b.txt", "README.md", "x.txt/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{name} {number}\n" for number in range(40)))
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(folder / "nothing")
    (folder / "linked.txt").symlink_to(tmp_path / "outside.txt")
    (tmp_path / "outside.txt").write_text("outside\n")
    os.mkfifo(folder / "pipe.txt")
    (folder / "new\nline.txt").write_text("x")
    (folder / os.fsdecode(b"\xff.txt")).write_text("x")
    found = find_files(folder, ["text"])
    assert list(found.files) == ["b.txt", "linked.txt", "sub/a.txt", "x.txt/c.txt"]
    skipped = {reason: len(names) for reason, names in found.skipped.items()}
    assert skipped == {
        "hidden": 4,
        "link to a folder": 1,
        "broken link": 1,
        "not a regular file": 1,
        "unprintable name": 2,
        "other suffix": 1,
    }
    keys = ["source.name=text", "tokenizer.name=bytes", "length=64", "pad_policy=ignore", "source.unit=lines"]
    command = ["prepare", str(empty_yaml), *keys, f"source.path={folder}", f"out={tmp_path / 'data'}", "workers=1"]
    assert main(command) == 0
    counts = Manifest.read(tmp_path / "data").counts
    assert {name: counts[f"skipped: {name}"] for name in skipped} == skipped
    assert ".x.txt" in capsys.readouterr().out


def test_hidden_files_are_read_by_no_source(tmp_path):
    for name, make, raw in (
        (".a.smi", smiles, "CCO\n"),
        (".a.fa", genomes, ">s\nACGTACGT\n"),
        (".a.txt", text, "text\n"),
    ):
        folder = tmp_path / name[1:]
        folder.mkdir()
        (folder / name).write_text(raw)
        with pytest.raises(UserError, match="hidden"):
            make(folder).parts(100)


@pytest.mark.parametrize("kind", ["fifo", "device", "missing", "loop"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    path = path if kind != "device" else "/dev/zero"
    readers = (
        read_texts,
        read_prompts,
        read_species_table,
        lambda path: text(path).parts(1),
        lambda path: smiles(path).parts(1),
    )
    for reader in readers:
        with pytest.raises(UserError, match=str(path)):
            reader(tmp_path / path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/a.txt", None),
        ("val/a.txt", "validation"),
        ("VALID/a.txt", "validation"),
        ("dev.jsonl.gz", "validation"),
        ("wiki.validation.raw", "validation"),
        ("test/train_cat.txt", "test"),
        ("my-test-set/train/a.txt", None),
        ("contest/devil.txt", None),
        ("heldout-monolingual/news.en.heldout-00000-of-00050", "test"),
    ],
)
def test_splits_of_names(name, split):
    assert split_of_name(name) == split


def test_names_are_splits_where_all_files_have_one():
    names = ["train/a.txt", "val/b.txt", "test/c.txt"]
    assert list(split_by_name(names, "auto").values()) == [None, "validation", "test"]
    assert set(split_by_name(names, "hash").values()) == {None}
    assert set(split_by_name(["train.txt", "my_test_run.txt", "more.txt"], "auto").values()) == {None}
    assert set(split_by_name(["test/a.txt", "test/b.txt"], "auto").values()) == {None}
    assert without_split("train/human/chr1.fa") == "human/chr1.fa"
    assert without_split("train/test/chr1.fa") == "test/chr1.fa"


@pytest.mark.parametrize("other", ["README.txt", "unlabeled/a.txt"])
def test_files_beside_published_splits_do_not_mix_them(other):
    names = ["train/a.txt", "test/c.txt", other]
    with pytest.raises(UserError, match=other):
        split_by_name(names, "auto")
    assert list(split_by_name(names, "names").values()) == [None, "test", None]
    assert set(split_by_name(names, "hash").values()) == {None}


@pytest.mark.parametrize(
    ("make", "suffix", "raw", "keys"),
    [
        (text, ".txt", "{}\n", {}),
        (text, ".jsonl", '{{"text": "{}"}}\n', {}),
        (smiles, ".csv", "SMILES\n{}\n", {}),
        (smiles, ".smi", "{}\n", {}),
        (genomes, ".fa", ">s\n{}\n", {}),
        (genomes, ".fa", ">s\n{}\n", {"species_from": "folder"}),
    ],
)
def test_split_folders_are_splits_of_every_source(tmp_path, make, suffix, raw, keys):
    for split, content in (
        ("train", "CCCC"),
        ("dev", "GGGG" if make is genomes else "CCO"),
        ("test", "CCCN" if make is smiles else "CCCA"),
    ):
        folder = tmp_path / split / "ape"
        folder.mkdir(parents=True)
        (folder / f"a{suffix}").write_text(raw.format(content))
    source = make(tmp_path, **keys)
    assert source.published == ("validation", "test")
    found = {part.split: [r.content for r in source.records(part, Tally())] for part in source.parts(1 << 40)}
    assert list(found) == [None, "validation", "test"] and all(len(records) == 1 for records in found.values())
    if keys:
        assert source.labels == ("ape",)


def test_formats_by_name_and_by_key(tmp_path):
    rows = '{"text": "one"}\n{"text": "two"}\n'
    for name in ("a.ndjson", "b.JSONLINES", "c.json", "d.jsonl.gz", "e.json.xz"):
        raw = rows.encode()
        (tmp_path / name).write_bytes(PACK.get(f".{name.rsplit('.')[-1]}", bytes)(raw))
        assert read(text(tmp_path / name))[0] == ["one", "two"]
    (tmp_path / "news.en-00001-of-00002").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"news\.en-00001.*source\.format"):
        text(tmp_path, pattern="news.*").parts(1)
    named = text(tmp_path, pattern="news.*", format="text")
    assert read(named)[0] == ["one", "two"]
    assert {reason: len(names) for reason, names in named.skipped.items()} == {"other name": 5}
    (tmp_path / "x.dat").write_text(rows)
    assert read(text(tmp_path / "x.dat", format="jsonl"))[0] == ["one", "two"]


# Prompts.


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("p.txt", "${oc.env:HOME}\r\n\r\n[red]b[/red]\r???"),
        ("p.jsonl", '{"prompt": "${oc.env:HOME}", "id": 1}\r{"prompt": "[red]b[/red]"}\n\n{"prompt": "???"}\n'),
        ("p.csv", 'id,prompt\n1,${oc.env:HOME}\n2,[red]b[/red]\n3,"???"\n'),
        ("prompts", "${oc.env:HOME}\n[red]b[/red]\n???\n"),
    ],
)
def test_prompts_are_text(tmp_path, name, raw, encoding):
    (tmp_path / name).write_bytes(encoded(raw, encoding))
    assert read_prompts(tmp_path / name) == ["${oc.env:HOME}", "[red]b[/red]", "???"]


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("p.dat", "a"),
        ("p.txt", ""),
        ("p.txt", "\n\n"),
        ("p.jsonl", '{"text": "a"}'),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}'),
        ("p.csv", "prompt,id\n,1\na,2\n"),
        ("p.json", '["a"]'),
        ("p.png", "a"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, name, raw):
    (tmp_path / name).write_text(raw)
    with pytest.raises(UserError, match=name):
        read_prompts(tmp_path / name)


def test_moses_counts_blank_lines_and_refuses_bad_ones(tmp_path):
    from scmdm.domains.molecules.moses_table import _read

    path = tmp_path / "a.smi"
    path.write_bytes(b"\xef\xbb\xbfSMILES\r\nCCO\r\n\r\nCCN name\r\n")
    assert _read(path, None) == (["CCO", "", "CCN"], [True] * 3, 3)
    for name, raw in (
        ("a.jsonl", '{"text": "CCO", "framed": "yes"}'),
        ("b.jsonl", '{"text": 1' + "0" * 5000 + "}"),
        ("c.smi", "C\0C"),
        ("d.csv", 'SMILES\n"CC'),
        ("e.dat", "CC"),
    ):
        (tmp_path / name).write_text(raw)
        with pytest.raises(UserError, match=name):
            _read(tmp_path / name, None)
    (tmp_path / "f.csv").write_text('id,SMILES\n1,"CCO"\n')
    (tmp_path / "g.jsonl").write_text('{"text": "CCO", "framed": false, "length": 3}\n')
    assert _read(tmp_path / "f.csv", None)[0] == ["CCO"] and _read(tmp_path / "g.jsonl", None)[1] == [False]
