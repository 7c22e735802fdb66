"""Where answers end, and which have the form of one."""

import pytest

from scmdm.data.tokenizers import CharacterTokenizer
from scmdm.sampling.end_tokens import cut_at_end, is_framed_answer

TOKENIZER = CharacterTokenizer("ab")
A, B = (TOKENIZER.encode("ab")[at] for at in (0, 1))
EOS, PAD, BOS, OTHER = TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.bos_id, B
ENDS = (EOS, OTHER)  # a second end token, as of a turn


@pytest.mark.parametrize(
    ("ids", "padded", "unpadded"),
    [
        ([A, EOS, PAD, PAD], True, True),
        ([A, OTHER, EOS, PAD], True, True),
        ([A, A, A, A], True, True),
        ([EOS, A, PAD, PAD], False, True),
        ([A, EOS, A, BOS], False, True),
        ([A, PAD, EOS, PAD], False, False),
        ([BOS, A, EOS, PAD], False, False),
    ],
)
def test_the_form_of_an_answer(ids, padded, unpadded):
    """What follows the end counts only where the model has learned it."""
    assert is_framed_answer(ids, TOKENIZER, ENDS, padded=True) == padded
    assert is_framed_answer(ids, TOKENIZER, ENDS, padded=False) == unpadded


def test_ids_are_cut_at_the_first_end():
    assert cut_at_end([EOS, A, OTHER, A], 1, ENDS) == [EOS, A]
    assert cut_at_end([A, A], 0, ENDS) == [A, A]
