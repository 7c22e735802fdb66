"""text8 (Mahoney, 2006): 100 million characters of Wikipedia, a to z and spaces, in one line.

By convention the first 90 million are for training, the next 5 million for validation and the last 5 million for test
(Austin et al., D3PM, arXiv 2107.03006, appendix B; MDLM). A file of another size is split in the same proportions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from data_prep.corpus_files import kind_of
from data_prep.text_files import HAS_NUL, TextFile
from scmdm.config.fields import PathKind, key
from scmdm.config.preparation import SourceConfig
from scmdm.data.preparation.records import Part, Record, Slice, Tally
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError

_PERCENTAGES = (("train", 0, 90), ("validation", 90, 95), ("test", 95, 100))


@dataclass
class Text8Config(SourceConfig):
    """Keys of the source `text8`."""

    path: str = key(MISSING, path=PathKind.INPUT, formerly=("path",), help="the file text8, uncompressed")


class Text8Source(Source):
    """Adjacent windows of `length - 2` characters, split by split. The remainder of a split is dropped."""

    Config = Text8Config
    tokenizers = ("characters",)
    name = "text8"

    def __init__(self, config: Text8Config, length: int) -> None:
        self.path, self.window = Path(config.path), length - 2

    @property
    def published(self) -> tuple[str, ...]:
        return tuple(split for split, _, _ in _PERCENTAGES)

    def files(self) -> dict[str, Path]:
        """The file. Raises UserError when it does not exist."""
        if not self.path.is_file():
            raise UserError(f"source.path={self.path} is not a file; give the file text8, uncompressed")
        if (compression := kind_of(self.path.name).compression) is not None:
            raise UserError(f"source.path={self.path} is compressed with {compression}; decompress it")
        file = TextFile(self.path)
        next(file.chunks(), b"")
        if file.problem is not None:
            raise UserError(
                f"source.path={self.path} is not the file text8: {file.problem.reason}: {file.problem.where}; give it "
                "uncompressed"
            )
        return {"text8": self.path}

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of whole windows within a split."""
        found, step = self.files()["text8"].stat().st_size, max(1, part_bytes // self.window) * self.window
        return [
            Part((Slice("text8", at, min(at + step, found * last // 100)),), split)
            for split, first, last in _PERCENTAGES
            for at in range(found * first // 100, found * last // 100, step)
        ]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield windows; drop those with a byte outside ASCII."""
        for piece in part.slices:
            assert piece.end is not None
            with open(self.path, "rb") as file:
                file.seek(piece.start)
                for at in range(piece.start, piece.end - self.window + 1, self.window):
                    tally.read()
                    window = file.read(self.window)
                    if not window.isascii():
                        tally.drop("not ASCII", f"{self.path} at byte {at}")
                    elif b"\0" in window:
                        tally.drop(HAS_NUL, f"{self.path} at byte {at}")
                    else:
                        yield Record(window.decode("ascii"))
