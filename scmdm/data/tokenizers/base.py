"""Interface of tokenizers, and functions on the ids of any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from scmdm.config.preparation import TokenizerConfig
from scmdm.errors import UserError

if TYPE_CHECKING:
    from scmdm.data.tokenizers.chat_template import ChatTemplate

SPECIALS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]")
LARGEST_VOCABULARY = 1 << 24  # ids; an embedding has a row for each
Content = str | bytes  # of a record: text, or the bytes of token values


class UnknownSymbol(ValueError):
    """A symbol is not in the vocabulary."""

    reason: ClassVar[str] = "unknown symbol"  # in the counts of a data set


class ReservedSymbol(UnknownSymbol):
    """A text spells a special, such as the mask, which would then be taken for one."""

    reason = "reserved id"


class Tokenizer(ABC):
    """Conversion between the content of records and token ids.

    All ids, those of the specials and the mask included, are below `vocab_size`. A subclass is registered in
    `scmdm.config.preparation.TOKENIZERS` under its `kind`.

    `encode` never returns the id of a special, whatever a vocabulary holds and whichever tokens its file marks as
    special: it checks the ids themselves.
    """

    Config: ClassVar[type[TokenizerConfig]] = TokenizerConfig
    kind: ClassVar[str]
    can_spell_specials: ClassVar[bool] = True  # False: ids are computed from values, above those of the specials
    learns_from_text: ClassVar[bool] = False  # `build` reads a sample of the training split

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int
    unk_id: int | None = None  # stands for symbols outside the vocabulary; None: `encode` raises UnknownSymbol for them

    @classmethod
    def open(cls, config: Any, *, padded: bool) -> Self | None:
        """Open the tokenizer that the configuration names; None when it is to be built from the corpus.

        `padded`: whether the data set has padding, for which the tokenizer then needs an id. Raises UserError.
        """
        return None

    @classmethod
    @abstractmethod
    def build(cls, config: Any, *, symbols: Iterable[str], sample: Iterable[str], layout: GridLayout | None) -> Self:
        """Make a tokenizer for a corpus.

        Args:
            config: an instance of `Config`.
            symbols: distinct symbols of all records, as `symbols_of` returns them.
            sample: texts of the training split; empty unless `learns_from_text`.
            layout: shape of the records, for sources of grids.

        Raises:
            UserError: the configuration does not fit the corpus.
        """

    @classmethod
    def parse(cls, content: dict[str, Any], path: Path) -> Self:
        """Make a tokenizer from the JSON content of `path`. Raises UserError or ValueError if that is malformed."""
        raise ValueError(f"a tokenizer of kind {cls.kind} is not stored as JSON")

    @classmethod
    def symbols_of(cls, content: Content) -> Iterable[str]:
        """Return the symbols of a record, for the vocabulary. Raises UnknownSymbol for unusable content."""
        return ()

    def encode(self, content: Content) -> list[int]:
        """Return the ids of a record's content, without specials. Raises UnknownSymbol, ReservedSymbol included."""
        ids = self._ids_of(content)
        if self.can_spell_specials and not self._reserved.isdisjoint(ids):
            self._refuse_reserved(ids)
        return ids

    @property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises UserError when there is none, or one that is not supported."""
        raise UserError(f"a tokenizer of kind {self.kind} has no chat template; take a Hugging Face tokenizer with one")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a sample, [EOS] first."""
        return (self.eos_id,)

    @abstractmethod
    def _ids_of(self, content: Content) -> list[int]:
        """Return the ids of a record's content, which may include reserved ones. Raises UnknownSymbol."""

    @cached_property
    def _reserved(self) -> frozenset[int]:
        return frozenset((self.pad_id, self.bos_id, self.eos_id, self.mask_id))

    def _refuse_reserved(self, ids: Sequence[int]) -> None:
        at, found = next((at, i) for at, i in enumerate(ids) if i in self._reserved)
        name = self.tokens([found])[0]
        if found == self.unk_id:  # a tokenizer may use one id for both
            raise UnknownSymbol(f"token {at} is outside the vocabulary; {name!r} (id {found}) stands for it")
        role = next(role for role in ("mask", "eos", "bos", "pad") if getattr(self, f"{role}_id") == found)
        raise ReservedSymbol(f"token {at} is {name!r} (id {found}), which is reserved as {role}_id")

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text before the first [EOS], without specials."""

    @abstractmethod
    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return a readable token for each id."""

    @abstractmethod
    def save(self, directory: Path) -> Path:
        """Write one file into `directory` and return its path."""


@dataclass(frozen=True)
class GridLayout:
    """Shape of records that are grids of values: images of pixel levels, or rows of codes (one channel)."""

    height: int
    width: int
    channels: int
    levels: int  # values are 0 to levels - 1

    @property
    def values(self) -> int:
        """Number of values in a sample."""
        return self.height * self.width * self.channels

    @property
    def length(self) -> int:
        """Number of ids in a sample: [BOS] and the values."""
        return 1 + self.values

    @property
    def dtype(self) -> np.dtype:
        """Data type of the values in the bytes of a record."""
        return np.dtype("u1" if self.levels <= 1 << 8 else "<u2" if self.levels <= 1 << 16 else "<u4")

    def mirrored(self, content: bytes) -> bytes:
        """Return the bytes of an image with left and right exchanged."""
        values_HWC = np.frombuffer(content, self.dtype).reshape(self.height, self.width, self.channels)
        return values_HWC[:, ::-1].tobytes()


def check_ids(tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the specials are in the vocabulary, and the mask is none of the others."""
    if not 0 < tokenizer.vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(f"{tokenizer.vocab_size} ids; at most {LARGEST_VOCABULARY} are supported")
    ids = {role: getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos", "mask")}
    for role, id_ in ids.items():
        if not 0 <= id_ < tokenizer.vocab_size:
            raise ValueError(f"{role}_id={id_} is not below the vocabulary's size {tokenizer.vocab_size}")
    if ids["mask"] in (ids["pad"], ids["bos"], ids["eos"]):
        raise ValueError(f"the mask must be another token than padding, BOS and EOS; the ids are {ids}")


@runtime_checkable
class OwnFraming(Protocol):
    """Tokenizer whose sequences all have the same length and another frame than `[BOS] text [EOS]`."""

    def frame(self, ids: Sequence[int]) -> list[int]:
        """Return the sequence of a record's ids, specials included."""
        ...

    def is_framed(self, ids: Sequence[int]) -> bool:
        """Return whether a sequence has the form that `frame` returns."""
        ...


def as_text(content: Content) -> str:
    """Return the content of a text record."""
    assert isinstance(content, str)
    return content


def text_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the text alone: up to the first [EOS], without [PAD], [BOS] and [MASK].

    Where [BOS] and [EOS] share an id, a leading one counts as [BOS].
    """
    ids = list(ids)
    first = 1 if ids[:1] == [tokenizer.bos_id] else 0
    end = ids.index(tokenizer.eos_id, first) if tokenizer.eos_id in ids[first:] else len(ids)
    return [i for i in ids[first:end] if i not in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.mask_id)]


def is_framed(ids: Sequence[int], tokenizer: Tokenizer, padding_id: int) -> bool:
    """Return whether ids have the form of a sample: [BOS] first, and after the first [EOS] padding alone.

    `padding_id` is that of the model's data set, which may be padded with [EOS].
    """
    if isinstance(tokenizer, OwnFraming):
        return tokenizer.is_framed(ids)
    ids = list(ids)
    end = ids.index(tokenizer.eos_id, 1) + 1 if tokenizer.eos_id in ids[1:] else len(ids)
    text, rest = ids[1:end], ids[end:]
    marks = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.mask_id} - {tokenizer.eos_id}
    return ids[:1] == [tokenizer.bos_id] and not any(i in marks for i in text) and set(rest) <= {padding_id}


def is_block(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Return whether ids have the form of a block of concatenated texts: [BOS] first, [EOS] last, no [MASK]."""
    ids = list(ids)
    marks = {tokenizer.bos_id, tokenizer.mask_id} - {tokenizer.eos_id}
    return ids[:1] == [tokenizer.bos_id] and ids[-1:] == [tokenizer.eos_id] and marks.isdisjoint(ids[1:])


def block_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of a block of concatenated texts, joined by the name of the [EOS] token.

    A scorer with the same tokenizer parses that name as [EOS] again. MDLM measures generative perplexity on such texts.
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
