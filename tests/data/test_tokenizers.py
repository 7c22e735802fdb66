"""Tokenizers: round trips, specials, unknown symbols, files."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdkit import Chem

from scmdm.data.tokenizers import (
    SPECIALS,
    CharacterTokenizer,
    SentencePieceTokenizer,
    SmilesTokenizer,
    UnknownSymbol,
    is_framed,
    load_tokenizer,
)
from scmdm.errors import UserError

CORPUS = ["The quick brown fox jumps over the lazy dog.\n" * 3, "Pack my box with five dozen liquor jugs! " * 3] * 20
PIECES = st.sampled_from(
    ["C", "c", "N", "n", "O", "Br", "Cl", "[nH]", "[C@@H]", "(", ")", "=", "#", "1", "%12", "/", "."]
)


def fitted(kind, corpus):
    return kind(sorted({symbol for text in corpus for symbol in kind.split(text)}))


@pytest.fixture(scope="module")
def pieces():
    return SentencePieceTokenizer.fit(CORPUS, 300)


@given(st.lists(PIECES, min_size=1, max_size=40))
def test_smiles_split_into_their_pieces(parts):
    text = "".join(parts)
    assert SmilesTokenizer.split(text) == parts
    tokenizer = fitted(SmilesTokenizer, [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_smiles_of_a_real_molecule():
    text = Chem.MolToSmiles(Chem.MolFromSmiles("C[C@H](Br)c1cc[nH]c1Cl"))
    assert "Br" in SmilesTokenizer.split(text) and "[nH]" in SmilesTokenizer.split(text)


@pytest.mark.parametrize("text", ["C C", "CXy", "[unclosed", "C\n"])
def test_what_is_not_smiles_is_refused(text):
    with pytest.raises(UnknownSymbol):
        SmilesTokenizer.split(text)


@given(st.text(max_size=80))
def test_characters_round_trip(text):
    tokenizer = fitted(CharacterTokenizer, [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=60))
def test_sentencepiece_round_trips_any_text(pieces, text):
    """Also what it was not trained on: byte fallback."""
    assert pieces.decode(pieces.encode(text)) == text


def test_sentencepiece_keeps_spaces_and_lines(pieces):
    text = "  two  spaces\n\nand\tlines \n"
    assert pieces.decode(pieces.encode(text)) == text


def test_the_mask_cannot_be_typed(pieces):
    for tokenizer in (pieces, fitted(CharacterTokenizer, [*CORPUS, "[]MASKPDBOE"])):
        ids = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id}
        assert len(ids) == 4
        for special in SPECIALS:
            assert not ids & set(tokenizer.encode(special))


def test_decoding_stops_at_the_end_mark():
    t = SmilesTokenizer(["C", "N"])
    c, n = t.encode("CN")
    assert t.decode([t.bos_id, c, n, t.mask_id, c, t.eos_id, n, n, t.pad_id]) == "CNC"
    assert t.tokens([t.bos_id, c, t.mask_id]) == ["[BOS]", "C", "[MASK]"]
    with pytest.raises(UnknownSymbol, match="'O'"):
        t.encode("CO")


def test_files(tmp_path, pieces):
    for tokenizer in (pieces, fitted(CharacterTokenizer, CORPUS)):
        again = load_tokenizer(tokenizer.save(tmp_path))
        assert again.kind == tokenizer.kind and again.vocab_size == tokenizer.vocab_size
        assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
        assert (again.mask_id, again.pad_id) == (tokenizer.mask_id, tokenizer.pad_id)
    with pytest.raises(UserError, match="is missing"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "bad.model").write_bytes(b"no model")
    for name in ("bad.json", "bad.model"):
        with pytest.raises(UserError, match=re.escape(name)):
            load_tokenizer(tmp_path / name)


def test_sentencepiece_training_is_deterministic_and_says_what_does_not_fit(pieces):
    assert SentencePieceTokenizer.fit(CORPUS, 300)._model == pieces._model
    with pytest.raises(UserError, match="vocab_size=30000 does not fit"):
        SentencePieceTokenizer.fit(CORPUS, 30000)


def test_a_killed_trainer_is_not_blamed_on_the_vocabulary():
    def corpus():
        yield from CORPUS
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
        for _ in range(1000):  # what has just been started has no command yet
            for pid in children.read_text().split():
                if b"sentencepiece_trainer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
                    return
            time.sleep(0.01)

    with pytest.raises(UserError, match=r"signal 9.*memory") as refused:
        SentencePieceTokenizer.fit(corpus(), 300)
    assert "vocab_size" not in str(refused.value)


@pytest.mark.parametrize(
    ("pieces", "framed"),
    [
        ("^CC$__", True),
        ("^CCCC$", True),
        ("^CCCCC", True),  # cut: a chunk of a longer text
        ("CCC$__", False),
        ("^CC$_C", False),
        ("^CC$C_", False),
        ("^C_C$_", False),
        ("^CC$$_", False),
        ("^C^C$_", False),
        ("^CC__$", False),
        ("^C?$__", False),
        ("______", False),
    ],
)
def test_framing(pieces, framed):
    tokenizer = SmilesTokenizer(["C"])
    assert is_framed(["_^$?C".index(piece) for piece in pieces], tokenizer, tokenizer.pad_id) is framed


@pytest.mark.parametrize(
    ("pieces", "framed"),
    [("^CC$$$", True), ("^CCCC$", True), ("^CCCCC", True), ("^CC$__", False), ("^CC$$_", False), ("^CC$C$", False)],
)
def test_framing_of_samples_that_are_padded_with_the_end_mark(pieces, framed):
    tokenizer = SmilesTokenizer(["C"])
    assert is_framed(["_^$?C".index(piece) for piece in pieces], tokenizer, tokenizer.eos_id) is framed
