"""Interface of sources: corpora that are read in independent parts and yield clean records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from scmdm.config.preparation import SOURCES, PrepareConfig, SourceConfig
from scmdm.data.preparation.records import Part, Record, Tally
from scmdm.data.tokenizers import GridLayout
from scmdm.errors import UserError


class Source(ABC):
    """A corpus.

    A subclass is registered in `scmdm.config.preparation.SOURCES`. Its module imports optional packages where they are
    used, so that `--help` and validation work without them.

    Args:
        config: an instance of `Config`.
        length: ids per sample, [BOS] and [EOS] included.

    Raises:
        UserError: the files do not match the configuration.
    """

    Config: ClassVar[type[SourceConfig]] = SourceConfig
    tokenizers: ClassVar[tuple[str, ...]]  # names of supported tokenizers
    whole_records: ClassVar[bool] = True  # a record is one sample, as a molecule is; else it may fill several

    name: str  # in the manifest
    labels: tuple[str, ...] = ()  # names of the classes of records; empty: no classes

    @abstractmethod
    def __init__(self, config: Any, length: int) -> None: ...

    @property
    def published(self) -> tuple[str, ...]:
        """Splits that the corpus defines, possibly other than `SPLITS`; hashes assign records to the others."""
        return ()

    @property
    def layout(self) -> GridLayout | None:
        """Shape of the records of a source of grids; None for text."""
        return None

    @property
    def skipped(self) -> Mapping[str, Sequence[str]]:
        """Names in the folder of the corpus that are not read, by reason. The manifest counts them."""
        return {}

    @abstractmethod
    def files(self) -> dict[str, Path]:
        """Return the raw files in reading order, by names that do not depend on the location of the corpus."""

    @abstractmethod
    def parts(self, part_bytes: int) -> list[Part]:
        """Cut the corpus, in reading order, into parts of about `part_bytes` bytes of raw files."""

    @abstractmethod
    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield the clean records of a part in fixed order, with duplicates; `tally` counts those read and dropped."""

    def mirror_image(self, record: Record) -> Record | None:
        """Return the mirror image of a record, to be added to the training split; None: no augmentation."""
        return None


class GridSource(Source):
    """Base of sources whose records are grids of values, all of one shape."""

    def _require_length(self, length: int, layout: GridLayout) -> None:
        if length != layout.length:
            raise UserError(
                f"length={length} is not possible; the samples of {self.name} have {layout.values} values after [BOS]: "
                f"set length={layout.length}"
            )


def make_source(config: PrepareConfig) -> Source:
    """Make the source of a preparation. Raises UserError as the source does."""
    source: Source = SOURCES.load(config.source.name)(config.source, config.length)
    return source
