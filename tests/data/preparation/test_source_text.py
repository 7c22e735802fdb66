"""Formats of text: each gives the same documents; damage is counted or refused; parts change nothing."""

import gzip
import json
import re
import tracemalloc
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import data_prep.text_files
from data_prep.detokenizers import DETOKENIZERS
from data_prep.text import TextConfig, TextSource, passages
from data_prep.text8 import Text8Config, Text8Source
from scmdm.cli import main
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import Tally
from scmdm.errors import UserError
from tests.data.preparation.test_prepare import decoded, files

DOCUMENTS = [f"document {number}: " + "some words, " * (number % 7 + 1) for number in range(500)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in DOCUMENTS)


def write(path, texts=DOCUMENTS):
    """In the format that the name speaks of."""
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"number": range(len(texts)), "text": texts}), path, row_group_size=60)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        half = len(lines) // 2
        compress = zstandard.ZstdCompressor(write_content_size=False).compress
        path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    else:
        path.write_bytes(lines)
    return path


def text_source(path, unit="documents", **keys):
    return TextSource(TextConfig(path=str(path), unit=unit, **keys), length=64)


def read(path, unit="documents", **keys):
    """Records of a file, and what was counted."""
    source, tally = text_source(path, unit, **keys), Tally()
    parts = source.parts(1 << 40)
    return [record.content for part in parts for record in source.records(part, tally)], dict(tally.counts)


PACKED = [".jsonl.gz", ".jsonl.zst"]
NAMES = [".jsonl", *PACKED, ".parquet"]


@pytest.mark.parametrize("suffix", NAMES)
def test_every_format_gives_the_documents(tmp_path, suffix):
    assert read(write(tmp_path / f"a{suffix}")) == (DOCUMENTS, {"read": len(DOCUMENTS)})


@pytest.mark.parametrize("suffix", NAMES)
@pytest.mark.parametrize("part_bytes", [700, 5000])
def test_parts_together_are_the_whole(tmp_path, suffix, part_bytes):
    source, tally = text_source(write(tmp_path / f"a{suffix}")), Tally()
    parts = source.parts(part_bytes)
    assert (len(parts) > 1) == (suffix not in PACKED)
    assert [record.content for part in parts for record in source.records(part, tally)] == DOCUMENTS


@pytest.mark.parametrize("suffix", PACKED)
def test_a_truncated_stream_gives_what_came_whole_and_is_counted(tmp_path, suffix):
    texts = [f"{number} {zlib.crc32(str(number).encode())}" * 20 for number in range(2000)]
    path = write(tmp_path / f"a{suffix}", texts)
    whole = path.read_bytes()
    for end in (len(whole) - 1, len(whole) * 3 // 4, 3):
        path.write_bytes(whole[:end])
        found, counts = read(path)
        assert counts.pop("dropped: damaged file") == 1 and counts.get("read", 0) == len(found)
        assert found == texts[: len(found)]
        assert end < len(whole) // 2 or len(found) > len(texts) // 2
    tally = Tally(refuse=True)
    with pytest.raises(UserError, match="damaged file; correct it"):
        list(text_source(path).records(text_source(path).parts(1 << 40)[0], tally))


@pytest.mark.parametrize("suffix", [*PACKED, ".parquet"])
def test_flipped_bytes_are_counted(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}")
    damaged = bytearray(path.read_bytes())
    for at in range(len(damaged) // 3, len(damaged) // 3 + 40):
        damaged[at] ^= 0x55
    path.write_bytes(damaged)
    found, counts = read(path)
    assert found == DOCUMENTS or counts.get("dropped: damaged file")


def test_no_parquet_at_all_is_counted(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else" * 100)
    assert read(tmp_path / "a.parquet") == ([], {"dropped: damaged file": 1})
    assert len(text_source(tmp_path / "a.parquet").parts(10)) == 1


def test_a_missing_key_is_counted(tmp_path):
    path = write(tmp_path / "a.parquet")
    assert read(path, text_key="body") == ([], {"dropped: no key body": 1})
    pq.write_table(pa.table({"text": ["a", None, "b", " "]}), path)
    assert read(path) == (["a", "b"], {"read": 2, "dropped: no key text": 1, "dropped: empty": 1})
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n"text"\n[1]\n' + "[" * 100_000 + '\n{"text": "kept"}\n')
    assert read(tmp_path / "a.jsonl") == (
        ["kept"],
        {"read": 1, "dropped: key text is not text": 1, "dropped: not an object": 2, "dropped: malformed JSON": 1},
    )


def test_units(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\nthree\n")
    assert read(tmp_path / "a.txt", unit="lines")[0] == ["one", "two", "three"]
    assert read(tmp_path / "a.txt", unit="documents")[0] == ["one\ntwo\n\nthree\n"]
    assert len(text_source(tmp_path / "a.txt").parts(4)) == 1, "a document is never cut"
    assert len(text_source(tmp_path / "a.txt", "lines").parts(4)) == 4


def test_passages_join_paragraphs_and_cut_long_ones():
    blank = "a" + "\n" * 1_000_000 + "b"  # as many paragraphs take no quadratic time
    assert list(passages(blank)) == [blank]
    short, long = "x" * 3000, "y" * 9000
    document = "\n\n".join([short, short, short, long, "end"])
    assert list(passages(f" {document}\n")) == [f"{short}\n\n{short}", short, *(["y" * 4000] * 2), "y" * 1000, "end"]


WIKI = " \n = First = \n \n Some text . \n = = Part = = \n More . \n = Second title = \n Text . \n"


@pytest.mark.parametrize("size", [1, 5, 17, 40, 1000])
def test_wikitext_is_cut_into_articles_wherever_its_parts_end(tmp_path, size):
    path = tmp_path / "wiki.train.raw"
    path.write_text(WIKI)
    first, second = WIKI[2:].split(" = Second")  # the blank line in front belongs to nothing
    source, tally = text_source(path), Tally()
    found = [record.content for part in source.parts(size) for record in source.records(part, tally)]
    assert found == [first, " = Second" + second]


def test_splits_by_name(tmp_path):
    for name in ("wiki.valid.raw", "wiki.train.raw", "wiki.test.raw"):
        (tmp_path / name).write_text(WIKI)
    parts = text_source(tmp_path, split_by="names").parts(1 << 20)
    assert [part.split for part in parts] == [None, "validation", "test"]


@pytest.mark.parametrize(
    ("kind", "raw", "text"),
    [
        ("wikitext", " = Valkyria III = \n", " = Valkyria III =\n"),
        ("wikitext", " = = Gameplay = = \n", " == Gameplay ==\n"),
        (
            "wikitext",
            "a role @-@ playing game , 1 @,@ 000 @.@ 5 copies ; sold .",
            "a role-playing game, 1,000.5 copies; sold .",
        ),
        ("wikitext", "Chronicles 3 : War ( Japanese : X , lit . Y ) is", "Chronicles 3: War (Japanese: X, lit. Y) is"),
        ("wikitext", 'the " best one " of it \'s kind', 'the "best one" of it\'s kind'),
        ("wikitext", "at N C and 5 ° C of the boys ' N", "at 1 C and 5°C of the boys' N"),
        ("wikitext", "a ( b \n c ) d", "a ( b\n c ) d"),
        ("lm1b", 'He said : " I don \'t know " , why ?', 'He said: "I don\'t know", why?'),
        ("lm1b", "It cost $ 5 ( or so ) , see http : / / x.org .", "It cost $5 (or so), see http://x.org ."),
        ("lm1b", "It is so .\nIs it so ?\n", "It is so.\nIs it so?\n"),
        ("ptb", " N N N at $ N for the traders ' N or <unk> ", "N 1 1 at $1 for the traders' 1 or ?"),
        ("ptb", "did n't pay # N million and\\/or N", "didn't pay #1 million and/or N"),
        ("lambada", " \u201cyes , \u201d he said . ", '\n"yes , " he said .'),
        (
            "scientific_papers",
            "we use @xmath0 ( see fig . 1 ) , i.e. x @-@ rays",
            "we use @xmath0 (see fig. 1), i.e. x-rays",
        ),
        ("scientific_papers", "we ( see\n fig ) . \n", "we (see\nfig).\n"),
        ("none", "as it ( is ) .", "as it ( is ) ."),
    ],
)
def test_detokenizers(kind, raw, text):
    """The published substitutions, with what they get wrong."""
    assert DETOKENIZERS[kind](raw) == text


@pytest.mark.parametrize("kind", ["wikitext", "ptb", "lm1b"])
def test_a_line_is_detokenized_alone(kind):
    lines = ["a ( b , \n", "c ) ' d 's\n", ' e " f .\n', 'g " \n']
    assert DETOKENIZERS[kind]("".join(lines)) == "".join(map(DETOKENIZERS[kind], lines))


def test_rows_are_lines_with_their_feed_and_values_of_tables(tmp_path):
    (tmp_path / "wiki.valid.raw").write_text(" \n = A = \n\n x \n\t\n last")
    wanted = ["", " = A = \n", "", " x \n", "", " last"]
    for size in (1, 9, 1000):
        source, tally = text_source(tmp_path / "wiki.valid.raw", unit="rows"), Tally()
        found = [record.content for part in source.parts(size) for record in source.records(part, tally)]
        assert found == wanted and tally.counts == {"read": 6}
    rows = ["one\ntwo\n", "", "three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert read(tmp_path / "a.jsonl", unit="rows") == (rows, {"read": 3})


def test_text8_has_its_conventional_splits(tmp_path):
    text = "".join(chr(ord("a") + number % 26) for number in range(2000))
    (tmp_path / "text8").write_text(text)
    source, tally = Text8Source(Text8Config(path=str(tmp_path / "text8")), length=32), Tally()
    found = {"train": "", "validation": "", "test": ""}
    for part in source.parts(100):
        found[part.split] += "".join(record.content for record in source.records(part, tally))
    assert found == {"train": text[:1800], "validation": text[1800:1890], "test": text[1900:1990]}
    with pytest.raises(UserError, match="is not a file"):
        Text8Source(Text8Config(path=str(tmp_path)), length=32).parts(100)
    (tmp_path / "text8.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(UserError, match=r"text8\.gz .*gzip"):
        Text8Source(Text8Config(path=str(tmp_path / "text8.gz")), length=32).parts(100)


def test_the_same_data_set_whatever_the_workers(tmp_path, empty_yaml):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, suffix in enumerate(NAMES):
        write(corpus / f"{number}{suffix}", [f"{number} {text}" for text in DOCUMENTS])
    keys = ["source.name=text", f"source.path={corpus}", "tokenizer.name=bytes", "length=64", "source.unit=documents"]
    for workers in (1, 2):
        assert main(["prepare", str(empty_yaml), *keys, f"out={tmp_path / str(workers)}", f"workers={workers}"]) == 0
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert Manifest.read(tmp_path / "1").counts["kept"] == 4 * len(DOCUMENTS)
    assert any(text.startswith("3 document") for text in decoded(tmp_path / "1", "train"))


def test_a_row_of_parquet_that_is_not_utf_8_costs_no_other_row(tmp_path):
    texts = [text.encode() for text in DOCUMENTS]
    texts[3] = b"caf\xe9"
    column = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=60)

    found, counts = read(tmp_path / "a.parquet")

    assert found == DOCUMENTS[:3] + DOCUMENTS[4:]
    assert counts == {"read": len(DOCUMENTS) - 1, "dropped: not UTF-8": 1}


def test_members_of_a_gzip_with_zeros_behind_them(tmp_path):
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]) + bytes(1000))

    assert read(tmp_path / "a.jsonl.gz") == (DOCUMENTS, {"read": len(DOCUMENTS)})


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".TXT", ".Txt.GZ"])
def test_packed_text_and_names_in_capitals(tmp_path, suffix):
    raw = "".join(f"line {number}\n" for number in range(3000)).encode()
    pack = {"gz": gzip.compress, "zs": zstandard.ZstdCompressor().compress}.get(suffix.lower()[5:7], bytes)
    (tmp_path / f"a{suffix}").write_bytes(pack(raw))
    for path in (tmp_path, tmp_path / f"a{suffix}"):
        assert read(path, unit="lines")[0] == raw.decode().splitlines()
    assert read(tmp_path, unit="documents") == ([raw.decode()], {"read": 1})
    if suffix != ".TXT":
        (tmp_path / f"a{suffix}").write_bytes(pack(raw)[:-9])
        found, counts = read(tmp_path, unit="lines")
        assert counts["dropped: damaged file"] == 1 and found == raw.decode().splitlines()[: len(found)]


def test_json_is_read_by_lines_when_it_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read(tmp_path / "a.json")[0] == ["one", "two"]
    assert read(tmp_path, pattern="*.json")[0] == ["one", "two"]
    with pytest.raises(UserError, match="holds no"):
        read(tmp_path)
    (tmp_path / "a.json").write_text('\n [{"text": "one"}]')
    with pytest.raises(UserError, match=r"a\.json is one JSON array; write an object on each line"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.dat", "a.tar.gz", "a.PDF", "a.parquet.gz", "a.log", "a.jsonl.1"])
def test_what_says_that_it_is_something_else_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(UserError, match=rf"{re.escape(name)} .*\.jsonl, .*source\.format"):
        read(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(name)):
        read(tmp_path)
    (tmp_path / "README").write_text("any other name is text")
    assert read(tmp_path / "README")[0] == ["any other name is text"]


def test_a_document_that_is_too_long_is_counted_and_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep.text_files, "LONGEST", 100)
    short, long = "short", "long " * 50
    for suffix, texts in ((".jsonl", [short, long, short]), (".jsonl.gz", [short, long, short])):
        assert read(write(tmp_path / f"a{suffix}", texts)) == (
            [short] * 2,
            {"read": 2, "dropped: over-long document": 1},
        )
    lines = "".join(f"line {number}\n" for number in range(30))
    for suffix, pack in ((".txt", bytes), (".txt.gz", gzip.compress)):
        path = tmp_path / f"b{suffix}"
        path.write_bytes(pack(lines.encode()))
        assert read(path) == ([], {"dropped: over-long document": 1})
        assert read(path, unit="lines")[0] == lines.splitlines()
        path.write_bytes(pack(f"one\n{long}\ntwo\n".encode()))
        assert read(path, unit="lines") == (["one", "two"], {"read": 2, "dropped: over-long document": 1})
    (tmp_path / "wiki.raw").write_text(WIKI + " " + " x .\n" * 60 + " = Third = \n end .\n")
    found, counts = read(tmp_path / "wiki.raw")
    assert [text.split("\n")[0] for text in found] == [" = First = ", " = Third = "]
    assert counts["dropped: over-long document"] == 1


def test_memory_does_not_grow_with_one_line(tmp_path):
    """A line of 300 MiB, of which no more than the limit is ever held."""
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(300):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "end"}\n')
    tracemalloc.start()
    try:
        assert read(path) == (["end"], {"read": 1, "dropped: over-long document": 1})
        assert tracemalloc.get_traced_memory()[1] < 3 * data_prep.text_files.LONGEST
    finally:
        tracemalloc.stop()
