"""Genomes: windows, species, the split by regions, damaged files; by way of `scmdm prepare` where that is possible."""

import gzip
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.fasta import find_damage
from data_prep.genomes import GenomeSource, GenomeSourceConfig, read_species_table
from scmdm.cli import main
from scmdm.config.preparation import TokenizerConfig
from scmdm.data.loader import read_labels, read_split
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import SPLITS, Tally, join_parts
from scmdm.data.tokenizers import DnaTokenizer, UnknownSymbol, load_tokenizer
from scmdm.data.verification import verify_dataset
from scmdm.errors import UserError
from scmdm.system.package_data import user_cache
from tests.data.preparation.test_prepare import decoded, files


def dna(letters, seed=0, alphabet="ACGT"):
    return "".join(random.Random(seed).choices(alphabet, k=letters))


def fasta(sequences, width=60):
    lines = []
    for name, letters in sequences.items():
        lines += [f">{name} some description", *(letters[at : at + width] for at in range(0, len(letters), width))]
    return "\n".join(lines) + "\n"


def genome_source(path, letters, **keys):
    return GenomeSource(GenomeSourceConfig(path=str(path), **keys), length=letters + 2)


def debian_source(package):
    return GenomeSource(GenomeSourceConfig(path=f"debian:{package}"), length=256)


def read(path, letters, part_bytes=1 << 20, **keys):
    source, tally = genome_source(path, letters, **keys), Tally()
    records = [record for part in source.parts(part_bytes) for record in source.records(part, tally)]
    return records, dict(tally.counts)


def write(path, sequences, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fasta(sequences, **options))
    return path


def test_windows_by_hand(tmp_path):
    """Blocks of two windows of four letters: 0-7, 8-12; at stride 2 three windows fit into the first, one the last."""
    path = write(tmp_path / "a.fa", {"chr1": "ACGTTGCAGGATC", "chr2": "AAA", "chr3": ""}, width=5)
    records, counts = read(path, 4, stride=2, block_windows=2)
    assert [(r.content, r.group, r.label) for r in records] == [
        ("ACGT", "chr1:0", None),
        ("GTTG", "chr1:0", None),
        ("TGCA", "chr1:0", None),
        ("GGAT", "chr1:1", None),
    ]
    assert counts == {"read": 4, "dropped: sequence shorter than a window": 2}
    assert [r.content for r in read(path, 4)[0]] == ["ACGT", "TGCA", "GGAT"]


def test_letters(tmp_path):
    path = tmp_path / "a.fa"
    path.write_bytes(b"\n>x\r\nacgtACGU\r\nRYacgtAC\r\n NNNN ACGT\r\nAC-TACGT\n")
    records, counts = read(path, 8, max_unknown=0.25)
    assert [r.content for r in records] == ["ACGTACGT", "NNACGTAC"]
    assert counts == {"read": 4, "dropped: too many unknown letters": 1, "dropped: no nucleotide": 1}
    records, _ = read(path, 8, max_unknown=0.5, soft_masked="unknown")
    assert [r.content for r in records] == ["NNNNACGT", "NNNNACGT"], "acgtACGU, then NNNNACGT; RYacgtAC has 6 of 8"


def test_both_strands(tmp_path):
    path = write(tmp_path / "a.fa", {"x": "AACGTN"})
    records, counts = read(path, 6, max_unknown=0.5, reverse_complement=True)
    assert [r.content for r in records] == ["AACGTN", "NACGTT"] and counts == {"read": 2}
    assert records[0].group == records[1].group


@given(
    sequences=st.lists(st.text("ACGT", max_size=70), min_size=1, max_size=4),
    width=st.integers(1, 80),
    letters=st.integers(1, 9),
    stride=st.integers(1, 12),
    per_block=st.integers(1, 4),
    part_bytes=st.integers(1, 200),
)
def test_any_file_by_enumeration(tmp_path_factory, sequences, width, letters, stride, per_block, part_bytes):
    """Against slicing the whole sequences, however the file is broken into lines and parts."""
    path = write(tmp_path_factory.mktemp("x") / "a.fna", {f"s{i}": s for i, s in enumerate(sequences)}, width=width)
    block = letters * per_block
    expected = [
        (sequence[at : at + letters], f"s{index}:{start // block}")
        for index, sequence in enumerate(sequences)
        for start in range(0, len(sequence), block)
        for at in range(start, min(start + block, len(sequence)) - letters + 1, stride)
    ]
    records, _ = read(path, letters, part_bytes, stride=stride, block_windows=per_block)
    assert [(r.content, r.group) for r in records] == expected


def prepared(place, empty_yaml, path, *keys, status=0):
    out = place / "data"
    keys = [
        "source.name=genomes",
        "tokenizer.name=dna",
        "length=18",
        "workers=1",
        f"source.path={path}",
        f"out={out}",
        *keys,
    ]
    assert main(["prepare", str(empty_yaml), *keys]) == status
    return out


FRACTIONS = ("validation_fraction=0.2", "test_fraction=0.2")


@pytest.mark.parametrize("stride", [1, 5, 16, 23])
def test_splits_share_no_letters(tmp_path, empty_yaml, stride):
    """Every window of 16 random letters is found once in the genome: where it came from is known."""
    genome = {"one": dna(6000), "two": dna(3000, seed=1)}
    out = prepared(
        tmp_path,
        empty_yaml,
        write(tmp_path / "g.fa", genome),
        f"source.stride={stride}",
        "source.block_windows=8",
        *FRACTIONS,
    )
    together = "|".join(genome.values())
    letters = {}
    for split in SPLITS:
        windows = decoded(out, split)
        assert all(together.count(window) == 1 for window in windows)
        starts = [together.index(window) for window in windows]
        letters[split] = {at for start in starts for at in range(start, start + 16)}
        assert letters[split]
    assert not any(letters[a] & letters[b] for a in SPLITS for b in SPLITS if a < b)
    if stride <= 16:
        assert len(set.union(*letters.values())) >= 0.97 * 9000


def test_a_neighbour_of_other_files_does_not_move_a_window_to_another_split(tmp_path, empty_yaml):
    genome = write(tmp_path / "g" / "one.fa", {"one": dna(6000)})
    alone = prepared(tmp_path / "a", empty_yaml, genome, "source.block_windows=8", *FRACTIONS)
    write(tmp_path / "g" / "a.fa", {"two": dna(5000, seed=1)})
    both = prepared(tmp_path / "b", empty_yaml, tmp_path / "g", "source.block_windows=8", *FRACTIONS)
    for split in SPLITS:
        assert set(decoded(alone, split)) < set(decoded(both, split))


def labels_of(root):
    manifest = Manifest.read(root)
    tokenizer = load_tokenizer(root / manifest.tokenizer.file)
    found = Counter()
    for split in SPLITS:
        from streaming import StreamingDataset

        data = StreamingDataset(local=str(root), split=split, shuffle=False, batch_size=1)
        found.update((tokenizer.decode(row["tokens"].tolist()), manifest.labels[int(row["label"])]) for row in data)
    return found


def test_samples_are_full_and_labelled(tmp_path, empty_yaml):
    folder = tmp_path / "g"
    write(folder / "yeast" / "chr1.fa", {"chr1": dna(3000)})
    write(folder / "yeast" / "chr2.fasta", {"chr2": dna(2000, seed=2)})
    (folder / "worm" / "deep").mkdir(parents=True)
    with gzip.open(folder / "worm" / "deep" / "all.fna.gz", "wt") as file:
        file.write(fasta({"I": dna(2500, seed=3)}))
    (folder / "README.txt").write_text("no genome")
    out = prepared(tmp_path, empty_yaml, folder, "source.species_from=folder", "source.block_windows=4", *FRACTIONS)
    assert not verify_dataset(out)
    manifest = Manifest.read(out)
    assert manifest.labels == ["worm", "yeast"] and manifest.tokenizer.kind == "dna" and manifest.vocab_size == 9
    ids_NL = read_split(out, "train")
    assert (ids_NL[:, 0] == manifest.bos_id).all() and (ids_NL[:, -1] == manifest.eos_id).all()
    assert (ids_NL[:, 1:-1] >= 4).all() and ids_NL.shape[1] == 18
    found = labels_of(out)
    assert sum(found.values()) == manifest.counts["kept"] == 3000 // 16 + 2000 // 16 + 2500 // 16
    assert all((window in dna(2500, seed=3)) == (species == "worm") for window, species in found)


def test_species_of_a_table(tmp_path, empty_yaml):
    folder, table = tmp_path / "g", tmp_path / "species.tsv"
    write(folder / "mixed.fa", {"NC_1.1": dna(900), "NC_2.1": dna(900, seed=1)})
    write(folder / "sub" / "human.fa", {"chr1": dna(900, seed=2)})
    table.write_text("# name\tspecies\n\nNC_1.1\tE. coli\nNC_2.1\tphage\nhuman.fa\tH. sapiens\n")
    source = genome_source(folder, 16, species_table=str(table))
    assert source.labels == ("E. coli", "H. sapiens", "phage")
    records, _ = read(folder, 16, species_table=str(table))
    assert Counter(source.labels[r.label] for r in records) == dict.fromkeys(source.labels, 900 // 16)
    keys = (f"source.species_table={table}", "source.block_windows=2", *FRACTIONS)
    out = prepared(tmp_path, empty_yaml, folder, *keys)
    assert Manifest.read(out).labels == list(source.labels)
    moved = table.rename(tmp_path / "g" / "species.tsv")
    prepared(tmp_path, empty_yaml, folder, f"source.species_table={moved}", *keys[1:])
    moved.write_text(moved.read_text().replace("phage", "virus"))
    prepared(tmp_path, empty_yaml, folder, f"source.species_table={moved}", *keys[1:], status=1)  # another data set


def test_species_of_file_names(tmp_path):
    write(tmp_path / "Homo_sapiens.fa", {"chr1": dna(40)})
    with gzip.open(tmp_path / "mus.musculus.FASTA.gz", "wt") as file:
        file.write(fasta({"chr1": dna(40, seed=1)}))
    assert genome_source(tmp_path, 16, species_from="file").labels == ("Homo_sapiens", "mus.musculus")
    assert genome_source(tmp_path, 16).labels == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("NC_1.1 E. coli\n", r"line 1: 'NC_1.1 E. coli'; expected file name or sequence id, tab, species"),
        ("a\tb\na\tc\n", r"line 2: 'a' has another species above"),
        ("a\t\n", "line 1"),
        ("# nothing\n", "names no species"),
        (None, "species.tsv"),
    ],
)
def test_tables_that_are_not(tmp_path, content, message):
    path = tmp_path / "species.tsv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_species_table(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["source.path=/nonexistent/genome"], "does not exist"),
        (["source.path={place}/empty"], "holds no .fa, .fasta, .fna"),
        (["source.path={place}/g", "source.species_from=folder"], "is not in a folder below source.path="),
        (
            ["source.path={place}/g", "source.species_table={place}/table.tsv"],
            "names neither the sequence 'chr1' nor its file g.fa",
        ),
        (
            ["source.path={place}/g", "source.species_from=name"],
            "source.species_from='name' is not possible; it must be one of file, folder",
        ),
        (
            ["source.path={place}/g", "source.species_from=file", "source.species_table=t"],
            "source.species_table='t' is not possible",
        ),
        (["source.species_from=file"], "source.species_from='file' is not possible with source.path=None"),
        (["source.path={place}/g", "source.max_unknown=1.5"], "source.max_unknown=1.5 is not possible"),
        (["source.path={place}/g", "source.stride=0"], "source.stride=0 is not possible"),
        (["source.path={place}/g", "source.block_windows=0"], "source.block_windows=0 is not possible"),
        (
            ["source.path={place}/g", "tokenizer.name=characters"],
            "tokenizer.name='characters' is not possible; it must be one of dna",
        ),
        (
            ["source.name=text", "tokenizer.name=characters", "source.stride=4"],
            "unknown key `source.stride`",
        ),
        (["source.path={place}/g", "length=4096"], "no usable record ({'dropped: sequence shorter than a window': 1})"),
        (["source.path={place}/g"], "split validation of g is empty"),
    ],
)
def test_mistakes_are_named(tmp_path, empty_yaml, capsys, keys, message):
    write(tmp_path / "g" / "g.fa", {"chr1": dna(40)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.tsv").write_text("other.fa\tE. coli\n")
    base = ["source.name=genomes", "tokenizer.name=dna", "length=18", "workers=1", f"out={tmp_path / 'data'}"]
    assert main(["prepare", str(empty_yaml), *base, *(key.format(place=tmp_path) for key in keys)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.fixture
def dirty(tmp_path):
    """A whole file among others that are not."""
    folder = tmp_path / "dirty"
    write(folder / "a.fa", {"chr1": dna(2000)})
    whole = gzip.compress(fasta({"chr2": dna(4000, seed=1)}).encode())
    (folder / "b.fa.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "c.fa.gz").write_bytes(whole[:200] + bytes([whole[200] ^ 0xFF]) + whole[201:])
    (folder / "d.fa.gz").write_bytes(b">chr2\nACGT\n")
    (folder / "e.fa").write_text("ID   X56734; SV 1; linear\nSQ   acgt\n")
    (folder / "f.fa").write_bytes(b"")
    write(folder / "g.fa", {"protein": "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"})
    return folder


def test_dirt_is_counted_by_kind(tmp_path, empty_yaml, dirty):
    out = prepared(tmp_path, empty_yaml, dirty, "source.block_windows=2", *FRACTIONS)
    assert Manifest.read(out).counts == {
        "read": 127,
        "kept": 125,
        "dropped: damaged file": 3,
        "dropped: not FASTA": 1,
        "dropped: empty file": 1,
        "dropped: no nucleotide": 2,
    }


@pytest.mark.parametrize(("name", "kind"), [("b.fa.gz", "damaged file"), ("e.fa", "not FASTA"), ("g.fa", "no nucleo")])
def test_dirt_can_be_refused(tmp_path, empty_yaml, capsys, dirty, name, kind):
    assert find_damage(dirty / "a.fa") is None
    for path in dirty.iterdir():
        if path.name not in ("a.fa", name):
            path.unlink()
    prepared(tmp_path, empty_yaml, dirty, "on_dirty=refuse", "source.block_windows=2", *FRACTIONS, status=1)
    error = capsys.readouterr().err
    assert str(dirty / name) in error and kind in error and error.count("\n") == 1


def test_what_the_settings_leave_out_is_not_refused(tmp_path, empty_yaml):
    """A telomere of unknown letters, a short contig, a repetition."""
    genome = {"chr1": "N" * 160 + dna(2000), "contig": "ACGT", "again": dna(160)}
    keys = ("on_dirty=refuse", "source.block_windows=2", *FRACTIONS)
    out = prepared(tmp_path, empty_yaml, write(tmp_path / "g.fa", genome), *keys)
    counts = Manifest.read(out).counts
    assert counts["dropped: too many unknown letters"] == counts["dropped: duplicate"] == 10
    assert counts["dropped: sequence shorter than a window"] == 1
    assert counts["read"] == counts["kept"] + 20


def test_damage_after_the_file_was_looked_at_is_counted(tmp_path):
    """A file that breaks while it is read; an error of the disk ends the sequence likewise."""
    path = tmp_path / "a.fa.gz"
    path.write_bytes(gzip.compress(fasta({"chr1": dna(1_000_000)}).encode()))
    source, tally = genome_source(path, 100), Tally()
    records = source.records(source.parts(1 << 30)[0], tally)
    next(records)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))
    assert 0 < sum(1 for _ in records) < 9_999
    assert tally.counts["dropped: damaged file"] == 1


@pytest.mark.slow
def test_a_large_file_is_read_in_parts_of_whole_sequences(tmp_path, empty_yaml):
    path = write(tmp_path / "g.fa", {f"chr{i}": dna(400_000, seed=i) for i in range(4)})
    source = genome_source(path, 254)
    parts = source.parts(1 << 20)
    assert len(parts) == 2 and all(len(part.slices) == 1 for part in parts)
    assert len(join_parts(parts)) == 1
    keys = ("length=256", "part_mb=1")
    one = prepared(tmp_path / "one", empty_yaml, path, *keys)
    two = prepared(tmp_path / "two", empty_yaml, path, *keys, "workers=2")
    assert files(one) == files(two)
    assert Manifest.read(one).counts["kept"] == 4 * (400_000 // 254)


def test_a_chromosome_in_one_line_needs_no_more_memory_than_a_block(tmp_path):
    import tracemalloc

    path = tmp_path / "g.fa.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write(">chr1\n")
        for _ in range(32):
            file.write(dna(1000) * 1000)
    source, tally = genome_source(path, 20_000), Tally()
    tracemalloc.start()
    count = sum(1 for part in source.parts(1 << 20) for _ in source.records(part, tally))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1600 and peak < 8 << 20, "32 MB were read"


def test_the_alphabet_is_the_same_for_every_corpus(tmp_path):
    tokenizer = DnaTokenizer.build(TokenizerConfig(), symbols={"A"}, sample=[], layout=None)
    assert tokenizer.encode("ACGTN") == [4, 5, 6, 7, 8] and tokenizer.vocab_size == 9
    assert load_tokenizer(tokenizer.save(tmp_path)).decode([1, 4, 5, 6, 7, 8, 2, 4]) == "ACGTN"
    for text, letter in (("ACx", "x"), ("acgt", "a"), ("AC GT", " ")):
        with pytest.raises(UnknownSymbol, match=repr(letter)):
            tokenizer.encode(text)


def test_records_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"apt-get, which is not installed; give a folder of FASTA as source\.path="):
        debian_source("ragout-examples")
    assert not user_cache("bacteria").exists()


@pytest.mark.slow
def test_bacteria_come_from_their_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = debian_source("ragout-examples")
    assert source.labels == ("Escherichia_coli", "Helicobacter_pylori", "Staphylococcus_aureus", "Vibrio_cholerae")
    tally = Tally()
    found = Counter(record.label for part in source.parts(1 << 26) for record in source.records(part, tally))
    letters = {label: windows * 254 for label, windows in found.items()}
    # NCBI: 4,641,652; 1,652,982; 2,809,422; 3,024,069 + 1,108,250
    assert [round(letters[label] / 1e6, 2) for label in range(4)] == [4.64, 1.65, 2.81, 4.13]
    assert dict(tally.counts) == {"read": sum(found.values())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "letters"),
    [
        ("sibelia-examples", {"Helicobacter_pylori": 3.29, "Staphylococcus_aureus": 11.54}),
        ("bowtie2-examples", {"Lambda": 0.05}),
    ],
)
def test_other_packages_of_examples(tmp_path, monkeypatch, empty_yaml, package, letters):
    """The files have 3,288,735, 11,564,335 (some unknown) and 48,502 letters."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keys = [
        "source.name=genomes",
        f"source.path=debian:{package}",
        "tokenizer.name=dna",
        "length=256",
        "source.block_windows=8",
    ]
    keys += ["validation_fraction=0.2", "test_fraction=0.2", f"out={tmp_path / 'data'}"]
    assert main(["prepare", str(empty_yaml), *keys, "workers=1"]) == 0
    manifest = Manifest.read(tmp_path / "data")
    assert list(manifest.labels) == list(letters)
    found = Counter(label for split in SPLITS for label in read_labels(tmp_path / "data", split).tolist())
    assert [round(found[label] * 254 / 1e6, 2) for label in range(len(letters))] == list(letters.values())


def test_a_package_that_is_not_known_and_labels_that_are_given(tmp_path, empty_yaml, capsys):
    keys = ["source.name=genomes", "tokenizer.name=dna", "length=256", f"out={tmp_path / 'data'}"]
    assert main(["prepare", str(empty_yaml), *keys, "source.path=debian:hello"]) == 1
    assert "must be debian: and one of ragout-examples, sibelia-examples" in capsys.readouterr().err
    assert (
        main(["prepare", str(empty_yaml), *keys, "source.path=debian:bowtie2-examples", "source.species_from=file"])
        == 1
    )
    assert "source.species_from='file' is not possible with source.path=" in capsys.readouterr().err
