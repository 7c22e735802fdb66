"""What every tokenizer does, and what holds for the ids of any of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

SPECIALS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]")
Content = str | bytes  # of a record: text, or token values as they are


class UnknownSymbol(ValueError):
    """A symbol that the vocabulary does not have."""


class Tokenizer(Protocol):
    """Ids below `vocab_size`, specials and mask included."""

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int

    def encode(self, content: Content) -> list[int]:
        """Ids of a record's content, without specials. Raises UnknownSymbol."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first end mark, without specials."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """A readable piece for every id."""
        ...

    def save(self, directory: Path) -> Path:
        """Write one file into `directory` and return its path."""
        ...


@runtime_checkable
class OwnFraming(Protocol):
    """A tokenizer whose sequences are all equally long and have another frame than `[BOS] text [EOS]`."""

    def frame(self, ids: Sequence[int]) -> list[int]:
        """The sequence of a record's ids."""
        ...

    def is_framed(self, ids: Sequence[int]) -> bool:
        """Whether a sequence looks as `frame` makes them."""
        ...


def as_text(content: Content) -> str:
    """The content of a record of text."""
    assert isinstance(content, str)
    return content


def text_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The ids of the text itself: up to the first end mark, without padding, beginning and mask.

    Where one id marks both, a beginning that stands first is no end.
    """
    ids = list(ids)
    first = 1 if ids[:1] == [tokenizer.bos_id] else 0
    end = ids.index(tokenizer.eos_id, first) if tokenizer.eos_id in ids[first:] else len(ids)
    return [i for i in ids[first:end] if i not in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.mask_id)]


def is_framed(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether ids look as the data does: one beginning, first; at most one end; padding behind it and nowhere else."""
    if isinstance(tokenizer, OwnFraming):
        return tokenizer.is_framed(ids)
    ids = list(ids)
    end = ids.index(tokenizer.eos_id, 1) + 1 if tokenizer.eos_id in ids[1:] else len(ids)
    text, rest = ids[1:end], ids[end:]
    marks = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.mask_id} - {tokenizer.eos_id}
    return ids[:1] == [tokenizer.bos_id] and not any(i in marks for i in text) and set(rest) <= {tokenizer.pad_id}


def is_block(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether ids look as a block of concatenated texts does: a beginning first, an end last, no mask."""
    ids = list(ids)
    marks = {tokenizer.bos_id, tokenizer.mask_id} - {tokenizer.eos_id}
    return ids[:1] == [tokenizer.bos_id] and ids[-1:] == [tokenizer.eos_id] and marks.isdisjoint(ids[1:])


def block_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The texts of a block of concatenated ones, with the tokenizer's name of the end mark between them.

    A scorer with the same tokenizer reads the mark back: generative perplexity is measured on such texts (MDLM).
    """
    texts: list[list[int]] = [[]]
    for i in ids[1:] if list(ids[:1]) == [tokenizer.bos_id] else ids:
        if i == tokenizer.eos_id:
            texts.append([])
        else:
            texts[-1].append(i)
    if not texts[-1]:
        del texts[-1]
    return tokenizer.tokens([tokenizer.eos_id])[0].join(tokenizer.decode(part) for part in texts)
