"""From the ids of records to sequences of one length: each record alone, blocks of their stream, or several in one.

A framer sees the records of one split of one part, in order; nothing crosses the borders of parts, so that the result
does not depend on who makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scmdm.data.tokenizers import Tokenizer

_OPEN = 64  # samples that a packer fills at the same time


@dataclass(frozen=True)
class Row:
    """One sequence, before padding."""

    ids: Sequence[int]
    label: int | None = None
    documents: Sequence[int] | None = None  # of packed ones: the number of each id's document, from 0
    given: int | None = None  # number of leading ids that are never masked: [BOS] and a prompt


class Framer(Protocol):
    """Makes the sequences of one split of one part."""

    dropped: int  # tokens that are in no sequence

    def add(self, ids: Sequence[int], label: int | None) -> Iterator[Row]:
        """Take a record; returns what is complete with it."""
        ...

    def finish(self) -> Iterator[Row]:
        """What is left when there is no record any more."""
        ...


class Records:
    """`[BOS] ids [EOS]`, cut into as many sequences of at most `length` as it takes."""

    def __init__(self, length: int, tokenizer: Tokenizer) -> None:
        self._length, self._tokenizer, self.dropped = length, tokenizer, 0

    def add(self, ids: Sequence[int], label: int | None) -> Iterator[Row]:
        return (Row(sequence, label) for sequence in wrap(ids, self._length, self._tokenizer))

    def finish(self) -> Iterator[Row]:
        return iter(())


class Concatenate:
    """`[EOS]` behind every record, the stream of them cut into blocks of `length - 2`, `[BOS]` and `[EOS]` around each.

    The remainder is dropped, and counted in `dropped` (MDLM's OpenWebText, arXiv 2406.07524).
    """

    def __init__(self, length: int, tokenizer: Tokenizer) -> None:
        self._size, self._tokenizer, self.dropped = length - 2, tokenizer, 0
        self._stream: list[int] = []

    def add(self, ids: Sequence[int], label: int | None) -> Iterator[Row]:
        self._stream += [*ids, self._tokenizer.eos_id]
        whole = len(self._stream) // self._size * self._size
        blocks, self._stream = self._stream[:whole], self._stream[whole:]
        for at in range(0, whole, self._size):
            yield Row([self._tokenizer.bos_id, *blocks[at : at + self._size], self._tokenizer.eos_id])

    def finish(self) -> Iterator[Row]:
        self.dropped += len(self._stream)
        return iter(())


@dataclass
class _Sample:
    ids: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    count: int = 0

    def add(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.documents += [self.count] * len(ids)
        self.count += 1


class Packed:
    """Several whole `[BOS] ids [EOS]` in a sample, each with a number of its own; one that is too long is cut first.

    Best fit among the `_OPEN` samples that are being filled: each goes where the least space stays; where none has
    space, the fullest is closed.
    """

    def __init__(self, length: int, tokenizer: Tokenizer) -> None:
        self._length, self._tokenizer, self.dropped = length, tokenizer, 0
        self._open: list[_Sample] = []

    def add(self, ids: Sequence[int], label: int | None) -> Iterator[Row]:
        for sequence in wrap(ids, self._length, self._tokenizer):
            fits = [sample for sample in self._open if len(sample.ids) + len(sequence) <= self._length]
            if not fits and len(self._open) == _OPEN:
                fullest = max(self._open, key=lambda sample: len(sample.ids))
                self._open.remove(fullest)
                yield _row(fullest)
            if not fits:
                self._open.append(_Sample())
                fits = self._open[-1:]
            max(fits, key=lambda sample: len(sample.ids)).add(sequence)

    def finish(self) -> Iterator[Row]:
        yield from map(_row, self._open)
        self._open = []


def _row(sample: _Sample) -> Row:
    return Row(sample.ids, documents=sample.documents)


def wrap(ids: Sequence[int], length: int, tokenizer: Tokenizer) -> list[list[int]]:
    """`[BOS] ids [EOS]`, cut into as many sequences of at most `length` as it takes (MDLM's chunks)."""
    size = length - 2
    return [[tokenizer.bos_id, *ids[at : at + size], tokenizer.eos_id] for at in range(0, len(ids), size)]


FRAMERS: Mapping[str, Callable[[int, Tokenizer], Framer]] = {
    "records": Records,
    "concatenate": Concatenate,
    "packed": Packed,
}
