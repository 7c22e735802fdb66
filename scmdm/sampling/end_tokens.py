"""Tokens that end a sample: those of the tokenizer, [EOS] first, and others that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from scmdm.data.tokenizers import Tokenizer
from scmdm.errors import UserError


def end_token_ids(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of the tokenizer's end tokens and of the named ones. Raises UserError for an unknown name."""
    if not names:
        return tokenizer.end_ids
    ids = range(tokenizer.vocab_size)
    known = dict(zip(tokenizer.tokens(ids), ids, strict=True))
    for name in names:
        if name not in known:
            raise UserError(f"sampler.end_tokens: the model's tokenizer has no token {name!r}; give the name of one")
    return tuple(dict.fromkeys([*tokenizer.end_ids, *(known[name] for name in names)]))


def cut_at_end(ids: Sequence[int], start: int, end_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first end token at or after position `start`."""
    end = next((at for at in range(start, len(ids)) if ids[at] in end_ids), len(ids))
    return list(ids[:end])


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], start: int, end_ids: Sequence[int]) -> str:
    """Return the text between a prompt of `start` ids and the first end token, as it continues the prompt.

    The prompt may hold end tokens, as a conversation does.
    """
    known = next((at + 1 for at in reversed(range(start)) if ids[at] == tokenizer.eos_id), 0)
    before = tokenizer.decode(ids[known:start])
    return tokenizer.decode(cut_at_end(ids, start, end_ids)[known:])[len(before) :]


def is_framed_answer(ids: Sequence[int], tokenizer: Tokenizer, end_ids: Sequence[int], *, padded: bool) -> bool:
    """Return whether the ids after a prompt have the form of an answer: no special but end tokens and padding after.

    A model that has not learned to predict padding (`padded` false) draws anything after the end.
    """
    answer = cut_at_end(ids, 0, end_ids)
    marks = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.mask_id}
    ends = not padded or {tokenizer.pad_id, *end_ids}.issuperset(ids[len(answer) :])
    return ends and marks.isdisjoint(answer)
