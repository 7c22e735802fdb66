"""Framing: sequences of one length from the ids of records.

A framer receives the records of one split of one part, in order. No sequence spans two parts, so that the result does
not depend on the distribution of parts over workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scmdm.data.tokenizers import Tokenizer

_MAX_OPEN = 64  # samples that a packing framer fills at the same time


@dataclass(frozen=True)
class FramedSequence:
    """A sequence before padding."""

    ids: Sequence[int]
    label: int | None = None
    documents: Sequence[int] | None = None  # of packed samples: index of each id's document
    given: int | None = None  # number of leading ids that are never masked: [BOS] and the prompt
    given_mask: Sequence[bool] | None = None  # of conversations: whether each id is never masked


class Framer(Protocol):
    """Builder of the sequences of one split of one part."""

    dropped: int  # tokens that are in no sequence

    def add(self, ids: Sequence[int], label: int | None) -> Iterator[FramedSequence]:
        """Add a record and return the sequences that are complete now."""
        ...

    def finish(self) -> Iterator[FramedSequence]:
        """Return the remaining sequences after the last record."""
        ...


class RecordFramer:
    """One record per sequence, `[BOS] ids [EOS]`; longer records are cut into several sequences."""

    def __init__(self, length: int, tokenizer: Tokenizer) -> None:
        self._length, self._tokenizer, self.dropped = length, tokenizer, 0

    def add(self, ids: Sequence[int], label: int | None) -> Iterator[FramedSequence]:
        return (FramedSequence(sequence, label) for sequence in wrap(ids, self._length, self._tokenizer))

    def finish(self) -> Iterator[FramedSequence]:
        return iter(())


class ConcatenatingFramer:
    """Blocks of the concatenated records (MDLM's OpenWebText, arXiv 2406.07524).

    `[EOS]` is appended to each record (unless `end_marks` is false), their stream is cut into blocks of `length - 2`
    ids, and each block is framed by `[BOS]` and `[EOS]`. The remainder is dropped.
    """

    def __init__(self, length: int, tokenizer: Tokenizer, *, end_marks: bool = True) -> None:
        self._size, self._tokenizer, self.dropped = length - 2, tokenizer, 0
        self._ends = [tokenizer.eos_id] if end_marks else []
        self._stream: list[int] = []

    def add(self, ids: Sequence[int], label: int | None) -> Iterator[FramedSequence]:
        self._stream += [*ids, *self._ends]
        whole = len(self._stream) // self._size * self._size
        blocks, self._stream = self._stream[:whole], self._stream[whole:]
        for at in range(0, whole, self._size):
            yield FramedSequence([self._tokenizer.bos_id, *blocks[at : at + self._size], self._tokenizer.eos_id])

    def finish(self) -> Iterator[FramedSequence]:
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


class PackingFramer:
    """Several whole records per sample, `[BOS] ids [EOS]` each, numbered from 0; longer records are cut first.

    Records are packed by best fit: each goes to the open sample in which the least space remains. If none has space,
    the fullest is closed and a new one opened.
    """

    def __init__(self, length: int, tokenizer: Tokenizer) -> None:
        self._length, self._tokenizer, self.dropped = length, tokenizer, 0
        self._open: list[_Sample] = []

    def add(self, ids: Sequence[int], label: int | None) -> Iterator[FramedSequence]:
        for sequence in wrap(ids, self._length, self._tokenizer):
            fits = [sample for sample in self._open if len(sample.ids) + len(sequence) <= self._length]
            if not fits and len(self._open) == _MAX_OPEN:
                fullest = max(self._open, key=lambda sample: len(sample.ids))
                self._open.remove(fullest)
                yield _packed(fullest)
            if not fits:
                self._open.append(_Sample())
                fits = self._open[-1:]
            max(fits, key=lambda sample: len(sample.ids)).add(sequence)

    def finish(self) -> Iterator[FramedSequence]:
        yield from map(_packed, self._open)
        self._open = []


def _packed(sample: _Sample) -> FramedSequence:
    return FramedSequence(sample.ids, documents=sample.documents)


def wrap(ids: Sequence[int], length: int, tokenizer: Tokenizer) -> list[list[int]]:
    """Cut ids into sequences `[BOS] ids [EOS]` of at most `length` ids (MDLM's chunks)."""
    size = length - 2
    return [[tokenizer.bos_id, *ids[at : at + size], tokenizer.eos_id] for at in range(0, len(ids), size)]


FRAMERS: Mapping[str, Callable[[int, Tokenizer], Framer]] = {
    "records": RecordFramer,
    "concatenate": ConcatenatingFramer,
    "packed": PackingFramer,
}
