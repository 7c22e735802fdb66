"""Encoded ids: no text encodes to a special, and no symbol is lost, whatever the kind of tokenizer."""

import io
import itertools
import json
import re

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from scmdm.cli import main
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import (
    SPECIALS,
    HuggingFaceTokenizer,
    ReservedSymbol,
    SentencePieceTokenizer,
    SmilesTokenizer,
    UnknownSymbol,
    load_tokenizer,
)
from scmdm.errors import UserError

LETTERS = "abcdefgh"
KNOWN = st.text(LETTERS, min_size=1, max_size=12)
STRANGE = st.characters(exclude_characters=LETTERS, exclude_categories=["Cs", "Z", "C"])
UNKNOWN = st.text(STRANGE, min_size=1, max_size=3)


def pipeline(model, added=(), special=True, pre=None):
    tokens = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": special}
        for name, i in added
    ]
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return {"version": "1.0", **rest, "added_tokens": tokens, "pre_tokenizer": pre, "model": model}


def bpe(names, unk=None):
    vocab = {name: i for i, name in enumerate(names)}
    return {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "unk_token": unk}


def unigram(names, unk_id=None):
    return {"type": "Unigram", "vocab": [[name, -1.0] for name in names], "unk_id": unk_id}


SPLIT = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}


def words(names, unk):
    return {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)}, "unk_token": unk}


NAMES = [*LETTERS, "ab"]
LOSSY = {  # models that drop unknown symbols, or fail
    "bpe": pipeline(bpe(NAMES)),
    "bpe whose unk is in no vocabulary": pipeline(bpe(NAMES, "<unk>")),
    "bpe and tokens after its vocabulary": pipeline(bpe(NAMES), [("<mask>", 9), ("<s>", 10), ("</s>", 11)]),
    "unigram": pipeline(unigram(NAMES)),
    "unigram and tokens after its vocabulary": pipeline(unigram(NAMES), [("<mask>", 9)]),
    "words": pipeline(words(NAMES, "<unk>"), pre=SPLIT),
}
WITH_UNK = {
    "bpe": pipeline(bpe([*NAMES, "<unk>"], "<unk>")),
    "unigram": pipeline(unigram([*NAMES, "<unk>"], 9)),
    "words": pipeline(words([*NAMES, "<unk>"], "<unk>"), pre=SPLIT),
}


def opened(content, folder):
    path = folder / "given.json"
    path.write_text(json.dumps(content))
    return HuggingFaceTokenizer.from_files(path, padded=True)


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    return {name: opened(content, tmp_path_factory.mktemp("lossy")) for name, content in LOSSY.items()}


@pytest.fixture(scope="module")
def with_unk(tmp_path_factory):
    return {name: opened(content, tmp_path_factory.mktemp("unk")) for name, content in WITH_UNK.items()}


@pytest.fixture(scope="module")
def pieces():
    """A model without byte fallback, in which a text can spell the mask."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LETTERS, " ".join(LETTERS), "abc fed hag"] * 40),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        user_defined_symbols=["[MASK]"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("name", LOSSY)
@given(before=KNOWN, strange=UNKNOWN, after=KNOWN)
def test_a_model_without_a_token_for_unknown_symbols_loses_none(lossy, name, before, strange, after):
    tokenizer = lossy[name]
    ids = tokenizer.encode(before + after)
    assert "".join(tokenizer.tokens(ids)) == before + after and max(ids) < len(NAMES)
    with pytest.raises(UnknownSymbol):
        tokenizer.encode(before + strange + after)


@pytest.mark.parametrize("name", WITH_UNK)
@given(before=KNOWN, strange=UNKNOWN)
def test_a_token_for_unknown_symbols_stands_for_them(with_unk, name, before, strange):
    tokenizer = with_unk[name]
    assert tokenizer.unk_id == 9
    assert 9 in tokenizer.encode(before + strange) and 9 not in tokenizer.encode(before)


@given(before=KNOWN, strange=UNKNOWN)
def test_sentencepiece_without_byte_fallback_shows_unknown_symbols(pieces, before, strange):
    tokenizer = SentencePieceTokenizer(pieces)
    assert tokenizer.unk_id in tokenizer.encode(before + strange)
    assert tokenizer.unk_id not in tokenizer.encode(before)


SPELLING = {
    "a word": (pipeline(words([*NAMES, "[MASK]"], "a"), pre={"type": "WhitespaceSplit"}), "b [MASK] c"),
    "an added token that is not special": (pipeline(bpe(NAMES), [("<mask>", 9)], special=False), "ab<mask>c"),
    "a piece that is BOS": (pipeline(unigram([*NAMES, "<s>"])), "ab<s>c"),
    "a piece that is EOS": (pipeline(unigram([*NAMES, "</s>"])), "ab</s>c"),
    "a piece that is padding": (pipeline(unigram([*NAMES, "<pad>"])), "ab<pad>c"),
}


@pytest.mark.parametrize("name", SPELLING)
def test_a_text_that_spells_a_special_is_refused(tmp_path, name):
    content, text = SPELLING[name]
    with pytest.raises(ReservedSymbol):
        opened(content, tmp_path).encode(text)


def test_symbols_and_pieces_cannot_spell_a_special(pieces):
    with pytest.raises(ReservedSymbol):
        SentencePieceTokenizer(pieces).encode("ab [MASK] c")
    with pytest.raises(ReservedSymbol):
        SmilesTokenizer(["C"]).encode("C[MASK]C")  # an atom in brackets
    with pytest.raises(ReservedSymbol):
        SmilesTokenizer.symbols_of("C[MASK]C")


def prepared(tmp_path, empty_yaml, content, lines, *keys):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    keys = [f"source.path={tmp_path / 'texts.txt'}", f"tokenizer.path={tmp_path / 'tokenizer.json'}", *keys]
    keys += ["source.name=text", "source.unit=lines", "tokenizer.name=huggingface", "length=16", "workers=1"]
    return main(["prepare", str(empty_yaml), f"out={tmp_path / 'out'}", "deduplicate=false", *keys])


GOOD = [" ".join(letters) for letters in itertools.islice(itertools.permutations(LETTERS, 4), 120)]


def test_preparation_counts_reserved_and_unknown_symbols_with_their_places(tmp_path, empty_yaml, capsys):
    content = pipeline(words([*NAMES, "<unk>", "[MASK]"], "<unk>"), pre={"type": "WhitespaceSplit"})
    assert prepared(tmp_path, empty_yaml, content, [*GOOD, "a [MASK]", "a zz", "b [MASK]"]) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.counts == {"read": 123, "kept": 121, "dropped: reserved id": 2, "with unknown symbols": 1}
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'texts.txt'}, record 121" in shown and f"{tmp_path / 'texts.txt'}, record 122" in shown
    assert not any((read_split(tmp_path / "out", split) == manifest.mask_id).any() for split in manifest.splits)


def test_dropout_of_a_model_is_off_so_that_a_text_always_has_the_same_ids(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(pipeline({**bpe("ab"), "vocab": {"a": 0, "b": 1, "ab": 2}, "dropout": 0.5})))
    tokenizer = HuggingFaceTokenizer.from_files(path, padded=True)
    assert tokenizer.encode("ab" * 40) == [2] * 40


def test_preparation_drops_what_a_model_cannot_encode(tmp_path, empty_yaml):
    content = pipeline(bpe(NAMES), pre={"type": "WhitespaceSplit"})
    assert prepared(tmp_path, empty_yaml, content, [*GOOD, "a z", "éa"]) == 0
    assert Manifest.read(tmp_path / "out").counts == {"read": 122, "kept": 120, "dropped: unknown symbol": 2}


@pytest.mark.parametrize(("text", "keys"), [("a [MASK]", ("on_dirty=refuse",)), ("a z", ("on_dirty=refuse",))])
def test_preparation_can_refuse_them(tmp_path, empty_yaml, capsys, text, keys):
    content = pipeline(words([*NAMES, "[MASK]"], "none"), pre={"type": "WhitespaceSplit"})
    assert prepared(tmp_path, empty_yaml, content, [*GOOD, text], *keys) == 1
    assert "texts.txt, record 121" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_corpus_of_unknown_symbols_alone_is_refused(tmp_path, empty_yaml, capsys):
    content = pipeline(words(NAMES, "none"), pre={"type": "WhitespaceSplit"})
    assert prepared(tmp_path, empty_yaml, content, ["x y", "z z"]) == 1
    assert "texts.txt, record 1" in capsys.readouterr().err


FILES = {
    "bytes": {"kind": "bytes"},
    "symbols": {"kind": "smiles", "symbols": ["C", "N", "[nH]"]},
    "levels": {"kind": "levels", "height": 2, "width": 2, "channels": 1, "levels": 4},
    "huggingface": {
        "kind": "huggingface",
        "specials": {"mask": 9, "bos": 10, "eos": 11, "pad": 12},
        "pipeline": pipeline(bpe(NAMES)),
    },
}


def refused_or_whole(path):
    """Load a damaged file: an error names it, or the ids of what it has become are consistent."""
    tokenizer, message = None, str(path)
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        message = str(error)
    assert str(path) in message and "\n" not in message
    assert tokenizer is None or tokenizer.mask_id < tokenizer.vocab_size <= 1 << 24


@pytest.mark.parametrize("kind", FILES)
def test_a_flipped_bit_of_a_tokenizer_file_is_refused_or_loads(tmp_path, kind):
    whole = json.dumps(FILES[kind]).encode()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(whole)
    assert load_tokenizer(path).encode("C") if kind in ("bytes", "symbols") else load_tokenizer(path)
    for bit in range(0, 8 * len(whole), 3 if len(whole) < 200 else 23):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refused_or_whole(path)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("bytes", {"more": 1}),
        ("symbols", {"symbols": ["C", "C"]}),
        ("symbols", {"symbols": ["C", SPECIALS[3]]}),
        ("symbols", {"symbols": ["C", ""]}),
        ("symbols", {"symbols": ["C", 1]}),
        ("symbols", {"symbols": "CN"}),
        ("symbols", {"kind": "none"}),
        ("symbols", {"kind": None}),
        ("levels", {"levels": 1 << 40}),
        ("levels", {"height": 1 << 20, "width": 1 << 20}),
        ("levels", {"height": True}),
        ("levels", {"height": -1}),
        ("huggingface", {"specials": {"mask": 10, "bos": 10, "eos": 11, "pad": 12}}),
        ("huggingface", {"specials": {"mask": -1, "bos": 10, "eos": 11, "pad": 12}}),
        ("huggingface", {"specials": {"mask": 1 << 40, "bos": 10, "eos": 11, "pad": 12}}),
        ("huggingface", {"specials": {"mask": 9}}),
        ("huggingface", {"vocab_size": 1 << 40}),
        ("huggingface", {"vocab_size": "20"}),
        ("huggingface", {"pipeline": []}),
        ("huggingface", {"pipeline": {}}),
        ("huggingface", {"pipeline": pipeline({**words(NAMES, "a"), "vocab": {"a": 1 << 31}})}),
        ("huggingface", {"pipeline": pipeline({**bpe(NAMES), "vocab": {"a": (1 << 32) - 2}, "merges": []})}),
    ],
)
def test_impossible_values_in_a_tokenizer_file_are_refused(tmp_path, kind, changed):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**FILES[kind], **changed}))
    with pytest.raises(UserError, match=re.escape("tokenizer.json")):
        load_tokenizer(path)


@given(data=st.data())
def test_a_damaged_sentencepiece_model_is_refused_or_loads(pieces, tmp_path_factory, data):
    damaged = bytearray(pieces)
    for at in data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=4)):
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(pieces)))] if data.draw(st.booleans()) else damaged)
    refused_or_whole(path)
