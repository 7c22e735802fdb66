"""Tokens that end a sample: [EOS], and others that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from scmdm.data.tokenizers import Tokenizer
from scmdm.errors import UserError


def end_token_ids(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of [EOS] and of the named tokens. Raises UserError for a name that no token has."""
    if not names:
        return (tokenizer.eos_id,)
    ids = range(tokenizer.vocab_size)
    known = dict(zip(tokenizer.tokens(ids), ids, strict=True))
    for name in names:
        if name not in known:
            raise UserError(f"sampler.end_tokens: the model's tokenizer has no token {name!r}; give the name of one")
    return tuple(dict.fromkeys([tokenizer.eos_id, *(known[name] for name in names)]))


def cut_at_end(ids: Sequence[int], start: int, end_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first end token at or after position `start`."""
    end = next((at for at in range(start, len(ids)) if ids[at] in end_ids), len(ids))
    return list(ids[:end])
