"""text8 (Mahoney, 2006): 100 million characters of Wikipedia, a to z and spaces, in one line.

By convention the first 90 million are for training, 5 million for validation and the last 5 million for test (Austin et
al., D3PM, arXiv 2107.03006, appendix B; MDLM). Of a shorter or longer file the same shares are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scmdm.data.preparation.records import Part, Record, Slice, Tally
from scmdm.errors import UserError

_SHARES = (("train", 0, 90), ("validation", 90, 95), ("test", 95, 100))  # percent of the file


class Text8:
    """Windows of `window` characters that follow each other, split by split; what is left of a split is dropped."""

    name = "text8"
    whole_records = True
    published = ("train", "validation", "test")
    labels: tuple[str, ...] = ()

    def __init__(self, path: Path, window: int) -> None:
        self.path, self.window = path, window

    def files(self) -> dict[str, Path]:
        """The file. Raises UserError when it does not exist."""
        if not self.path.is_file():
            raise UserError(f"path={self.path} is no file; give the file text8, unpacked")
        return {"text8": self.path}

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of whole windows within a split."""
        found, step = self.files()["text8"].stat().st_size, max(1, part_bytes // self.window) * self.window
        return [
            Part((Slice("text8", at, min(at + step, found * last // 100)),), split)
            for split, first, last in _SHARES
            for at in range(found * first // 100, found * last // 100, step)
        ]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Windows; one with a byte that is no ASCII is left out."""
        for piece in part.slices:
            assert piece.end is not None
            with open(self.path, "rb") as file:
                file.seek(piece.start)
                for at in range(piece.start, piece.end - self.window + 1, self.window):
                    tally.read()
                    window = file.read(self.window)
                    if window.isascii():
                        yield Record(window.decode("ascii"))
                    else:
                        tally.drop("not ASCII", f"{self.path} at byte {at}")
