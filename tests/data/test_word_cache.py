"""Looking words up gives the ids that the library gives for the whole text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmdm.data.tokenizers.word_cache import _MAX_WORDS, WordEncoder, splits_at_white_space
from tests.data.preparation.test_source_huggingface import byte_pairs

PIPELINE = byte_pairs()
PIPELINE.encode_special_tokens = True
SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000"
PARTS = st.sampled_from(
    [*SPACES, "  ", "\n\n", "fox", "jumps", "Don't", "'s", "42", "...", "¿", "é", "東京", "<|endoftext|>", "\U0001f98a"]
)
TEXTS = st.one_of(st.lists(PARTS, max_size=12).map("".join), st.text(st.characters(exclude_categories=["Cs"])))


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_words_give_the_ids_of_the_whole_text(text):
    def library(piece):
        return PIPELINE.encode(piece, add_special_tokens=False).ids

    encoder = WordEncoder(library)
    assert encoder(text) == library(text)
    assert encoder(text) == library(text)  # now from memory


def test_the_memory_is_bounded_and_what_is_asked_again_is_not_encoded_again():
    asked = []
    encoder = WordEncoder(lambda word: asked.append(word) or [len(word)])
    assert encoder("one two two") == [3, 4, 4] and asked == ["one", " two"]
    long = "x" * 1000
    assert encoder(long) == encoder(long) == [1000] and asked.count(long) == 2
    for number in range(_MAX_WORDS + 10):
        encoder(str(number))
    assert len(encoder._known) <= _MAX_WORDS


def changed(**parts):
    return {**json.loads(byte_pairs().to_str()), **parts}


@pytest.mark.parametrize(
    ("pipeline", "apart"),
    [
        (changed(), True),
        (changed(normalizer={"type": "NFC"}), False),
        (changed(pre_tokenizer=None), False),
        (changed(pre_tokenizer={"type": "Metaspace"}), False),
        (changed(pre_tokenizer={"type": "ByteLevel", "use_regex": False}), False),
        (changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), False),
        (changed(added_tokens=[{"id": 300, "content": "a b", "special": False}]), False),
        (changed(model={"type": "Unigram", "vocab": []}), False),
        (changed(model={"type": "BPE", "dropout": 0.1}), False),
    ],
)
def test_only_pipelines_that_are_known_to_cut_before_words(pipeline, apart):
    assert splits_at_white_space(pipeline) == apart
