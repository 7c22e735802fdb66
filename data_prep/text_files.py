"""Text in files: compression, byte order marks, encodings and line ends, the same for all sources.

* A byte order mark of UTF-8, UTF-16 or UTF-32 decides the encoding; without one it is UTF-8.
* A mark of UTF-8 that begins a later line, where files were joined, is removed too.
* Lines end with a line feed, a carriage return, or both, also mixed.
* A file is binary if it begins as a known binary format does, or if more than one in thirty of its first 64 KiB are
  control characters (a third of what random bytes have). It is not read.
* A line that cannot be decoded, or that contains a NUL, is dropped and counted by the caller of `decode`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from data_prep.corpus_files import kind_of
from data_prep.decompression import read_chunks
from scmdm.data.preparation.records import Slice
from scmdm.errors import UserError
from scmdm.system.untrusted import reading, require_regular

LONGEST = 1 << 26  # bytes of a line or a document; longer ones are dropped
DAMAGED, BINARY, EMPTY, NOT_UTF_8, HAS_NUL = "damaged file", "binary file", "empty file", "not UTF-8", "NUL character"
_HEAD_BYTES = 1 << 16
_FEW_CONTROLS, _BINARY_SHARE = 4, 1 / 30
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SIGNATURES = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"\xfd7zXZ\0", "xz"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"%PDF-", "PDF"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"PAR1\x15", "parquet"),
    (b"ARROW1\0\0", "Arrow"),
    (b"\x93NUMPY", "NumPy"),
    (b"\x89HDF", "HDF5"),
    (b"SQLite format 3\0", "SQLite"),
    (b"\x7fELF", "a program"),
)
_BZIP2 = (b"BZh", b"1AY&SY")
_TAR_AT, _TAR = 257, b"ustar"
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\v\b\x1b")) + b"\x7f"
_UNDECODABLE = "scmdm-undecodable"  # replaces what cannot be decoded by half a surrogate pair, which UTF-8 refuses
codecs.register_error(_UNDECODABLE, lambda error: ("\udcff", getattr(error, "end", 0)))


@dataclass(frozen=True)
class FileProblem:
    """Why a file, or the rest of it, was not read."""

    reason: str
    where: str


@dataclass(frozen=True)
class _Encoding:
    name: str
    mark: int  # bytes of the byte order mark
    has_line_feeds: bool  # else carriage returns end the lines
    binary: str  # what the file is instead of text; empty: text


class TextFile:
    """A text file, compressed if its name says so. Read as UTF-8, without a byte order mark."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._compression = kind_of(path.name).compression
        self.problem: FileProblem | None = None  # set at the end of an iteration

    @cached_property
    def is_divisible(self) -> bool:
        """Return whether ranges of bytes can be read alone. A file that cannot be read stays whole."""
        if self._compression is not None:
            return False
        try:
            with reading(self.path, "text file"):
                found = self._encoding
        except UserError:
            return False
        return found.name == "utf-8" and found.has_line_feeds and not found.binary

    @cached_property
    def _encoding(self) -> _Encoding:
        require_regular(self.path)
        with open(self.path, "rb") as file:
            return _inspect(_head(read_chunks(file, self._compression)))

    @property
    def mark(self) -> int:
        """Bytes of the byte order mark, where the file is divisible."""
        return self._encoding.mark if self.is_divisible else 0

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield the contents from an offset, in pieces of any size. Sets `problem` for damage or a binary file."""
        self.problem, at = None, start
        try:
            with reading(self.path, f"{self._compression or 'text'} file"):
                encoding = self._encoding
                if encoding.binary:
                    self.problem = FileProblem(BINARY, f"{self.path}: {encoding.binary}")
                    return
                for chunk in self._decoded(encoding, start):
                    at += len(chunk)
                    yield chunk
        except UserError as error:
            self.problem = FileProblem(DAMAGED, str(error))
            return
        if at == 0:
            self.problem = FileProblem(EMPTY, str(self.path))

    def _decoded(self, encoding: _Encoding, start: int) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            file.seek(start)
            raw = _without(read_chunks(file, self._compression), encoding.mark if start == 0 else 0)
            yield from raw if encoding.name == "utf-8" else _to_utf_8(raw, encoding.name)

    def lines(self, piece: Slice | None = None, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
        r"""Yield the lines that begin in a slice, each with its place for `where`; they end with `\n`.

        Adjacent slices neither share nor miss lines. A line of more than `longest` bytes is cut after `longest + 1`.
        An incomplete line before damage is dropped.
        """
        piece, longest = piece or Slice(""), LONGEST if longest is None else longest
        if not self.is_divisible:
            lines = self._up_to_damage(_split(self.chunks(), longest))
            yield from enumerate((line for _, line in lines), start=1)
            return
        at = max(piece.start - 1, 0)
        lines, mark = self._up_to_damage(_split(self.chunks(at), longest)), 0 if at else self._encoding.mark
        if piece.start > 0:
            at += next(lines, (0, b""))[0] + mark  # the rest of a line that begins before the slice
            mark = 0
        for size, line in lines:
            if piece.end is not None and at >= piece.end:
                return
            yield at, line
            at, mark = at + size + mark, 0

    def _up_to_damage(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for size, line in lines:
            if self.problem is not None and not line.endswith(b"\n"):
                self.problem = FileProblem(self.problem.reason, f"{self.problem.where}; its last line is incomplete")
                return
            yield size, line.removeprefix(codecs.BOM_UTF8)

    def where(self, at: int) -> str:
        """Describe a place that `lines` has yielded."""
        return f"{self.path} at byte {at}" if self.is_divisible else f"{self.path}, line {at}"


def decode(raw: bytes) -> tuple[str | None, str]:
    """Decode a line or several; None and the reason if it is not text."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None, NOT_UTF_8
    return (None, HAS_NUL) if "\0" in text else (text, "")


def read_text_lines(path: Path, what: str, limit: int) -> list[str]:
    """Read all lines of a small text file, without their ends. Raises UserError, which names the place.

    `what` describes the file, as in `prompts=a.txt`; `limit` bounds its bytes after decompression.
    """
    file, found, size = TextFile(path), list[str](), 0
    for at, line in file.lines():
        size += len(line)
        if size > limit:
            raise UserError(f"{what} has more than {limit} bytes; give a smaller file")
        text, reason = decode(line)
        if text is None:
            raise UserError(f"{what} is not a text file: {file.where(at)}: {reason}; write it as UTF-8")
        found.append(text.removesuffix("\n"))
    if file.problem is not None and file.problem.reason != EMPTY:
        raise UserError(f"{what} is not a text file: {file.problem.reason}: {file.problem.where}; write it as UTF-8")
    return found


def _head(chunks: Iterable[bytes]) -> bytes:
    """Return the first bytes, or those before damage."""
    head = b""
    try:
        with reading("the file", "text file"):
            for chunk in chunks:
                head += chunk
                if len(head) >= _HEAD_BYTES:
                    break
    except UserError:
        return head
    return head[:_HEAD_BYTES]


def _inspect(head: bytes) -> _Encoding:
    mark, name = next(((mark, name) for mark, name in _MARKS if head.startswith(mark)), (b"", "utf-8"))
    text = head[len(mark) :]
    has_line_feeds = b"\n" in text or b"\r" not in text
    return _Encoding(name, len(mark), has_line_feeds, _binary_kind(text) if name == "utf-8" else "")


def _binary_kind(head: bytes) -> str:
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return f"its contents are {kind}, which its name does not say"
    if head.startswith(_BZIP2[0]) and head[4:].startswith(_BZIP2[1]):
        return "its contents are bzip2, which its name does not say"
    if head[_TAR_AT:].startswith(_TAR):
        return "its contents are a tar archive; unpack it"
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if controls < _FEW_CONTROLS or controls <= _BINARY_SHARE * len(head):
        return ""
    if head.count(b"\0") * 2 > controls:
        return "NUL bytes; if it is UTF-16 or UTF-32, it needs a byte order mark"
    return f"{controls} control characters in its first {len(head)} bytes"


def _without(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Remove the first `count` bytes."""
    head = b""
    while len(head) < count and (chunk := next(chunks, None)) is not None:
        head += chunk
    return chain([head[count:]], chunks) if count else chunks


def _to_utf_8(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(errors=_UNDECODABLE)
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")


def _split(chunks: Iterable[bytes], longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line, cut after `longest + 1` bytes, and the bytes that it has in the file."""
    held, kept, size, is_open_return = list[bytes](), 0, 0, False  # beginning of a line that the next chunk continues
    for chunk in filter(None, chunks):
        if is_open_return:  # the line ends with a carriage return, to which a line feed may belong
            rest = chunk.removeprefix(b"\n")
            yield size + len(chunk) - len(rest), _finished(b"".join(held), longest)
            held, kept, size, chunk = [], 0, 0, rest
        pieces = chunk.splitlines(keepends=True)
        rest = pieces.pop() if pieces and not pieces[-1].endswith(b"\n") else b""
        is_open_return = rest.endswith(b"\r")
        if held and pieces:
            first = pieces.pop(0)
            held.append(first[: longest + 1 - kept])
            yield size + len(first), _finished(b"".join(held), longest)
            held, kept, size = [], 0, 0
        if b"\r" in chunk:
            yield from ((len(line), _finished(line, longest)) for line in pieces)
        else:
            yield from ((len(line), line if len(line) <= longest else line[: longest + 1]) for line in pieces)
        if rest:
            held.append(rest[: longest + 1 - kept])
            kept, size = kept + len(held[-1]), size + len(rest)
    if held:
        yield size, _finished(b"".join(held), longest)


def _finished(line: bytes, longest: int) -> bytes:
    r"""End a line with `\n` where it ends with `\r` or `\r\n`, and cut it."""
    if line.endswith(b"\r\n"):
        line = line[:-2] + b"\n"
    elif line.endswith(b"\r"):
        line = line[:-1] + b"\n"
    return line if len(line) <= longest else line[: longest + 1]
