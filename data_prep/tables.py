"""Tables with a header: CSV and TSV, by the rules of the module `csv`.

A quoted field may contain delimiters and line ends. A table without quotes has a record on each line and can be read
in ranges of bytes; one with quotes is read as a whole. Lines before the header that begin with `#` are comments, and so
is Excel's line `sep=;`.
"""

from __future__ import annotations

import csv
import mmap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpus_files import kind_of
from data_prep.text_files import LONGEST, TextFile, decode
from scmdm.data.preparation.records import Slice

MALFORMED_ROW, OTHER_WIDTH, LONG_ROW = "malformed row", "more fields than the header", "over-long row"
REPEATED_HEADER = "repeated header"  # as in tables that were joined
_DELIMITERS: Mapping[str, Sequence[str]] = {"csv": (",", ";", "\t", "|"), "tsv": ("\t",)}
csv.field_size_limit(LONGEST)


@dataclass(frozen=True)
class TableRow:
    """Fields of a record, or the reason why there are none."""

    at: int  # for `TextFile.where`
    fields: list[str]
    problem: str = ""


@dataclass(frozen=True)
class TableHeader:
    """Names of the columns of a table."""

    columns: list[str]
    delimiter: str
    at: int

    def position(self, column: str) -> int | None:
        """Return the index of a column; None unless it occurs exactly once."""
        return self.columns.index(column) if self.columns.count(column) == 1 else None

    def describe(self) -> str:
        """List the columns for a message."""
        return ", ".join(map(repr, self.columns[:20])) + (", ..." if len(self.columns) > 20 else "")


def is_divisible_table(path: Path) -> bool:
    """Return whether each line of a table is one record, wherever a range of bytes begins."""
    if not TextFile(path).is_divisible or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b'"') < 0


def read_header(file: TextFile, wanted: Sequence[str], table_format: str | None = None) -> TableHeader | None:
    """Read the header of a table; None if the file has none, because it is empty or damaged.

    Takes the first delimiter of the format with which the header has the wanted columns.
    """
    found = None
    for delimiter in _DELIMITERS[table_format or kind_of(file.path.name).format or "csv"]:
        header = _first_row(file, delimiter, wanted)
        if header is not None and all(column in header.columns for column in wanted):
            return header
        found = found or header
    return found


def _first_row(file: TextFile, delimiter: str, wanted: Sequence[str]) -> TableHeader | None:
    for row in _records(file.lines(), delimiter):
        if row.problem:
            continue
        columns = [name.strip() for name in row.fields]
        if columns[0].lower().startswith("sep="):
            continue
        uncommented = [columns[0].lstrip("# "), *columns[1:]]
        if not columns[0].startswith("#") or all(name in uncommented for name in wanted):
            return TableHeader(columns if columns[0] in wanted else uncommented, delimiter, row.at)
    return None


def read_rows(file: TextFile, header: TableHeader, piece: Slice | None = None) -> Iterator[TableRow]:
    """Yield the records of a slice after the header; a record that cannot be read costs no other one."""
    for row in _records(file.lines(piece), header.delimiter):
        if row.at <= header.at:
            continue
        problem = row.problem or _problem_of(row.fields, header)
        yield TableRow(row.at, row.fields, problem) if problem else row


def _problem_of(fields: list[str], header: TableHeader) -> str:
    if any(map(str.strip, fields[len(header.columns) :])):
        return OTHER_WIDTH
    columns = header.columns
    repeated = fields[0].strip("# ") == columns[0] and [name.strip() for name in fields[1:]] == columns[1:]
    return REPEATED_HEADER if repeated else ""


def _records(lines: Iterable[tuple[int, bytes]], delimiter: str) -> Iterator[TableRow]:
    source, returned = iter(lines), deque[tuple[int, bytes]]()

    def following() -> Iterator[tuple[int, bytes]]:
        while True:
            line = returned.popleft() if returned else next(source, None)
            if line is None:
                return
            yield line

    for at, line in following():
        text, problem = decode(line)
        if text is None or len(line) > LONGEST:
            yield TableRow(at, [], problem or LONG_ROW)
        elif '"' not in text:
            if text.strip(" \n"):
                yield TableRow(at, text.removesuffix("\n").split(delimiter))
        else:
            taken: list[tuple[int, bytes]] = []
            fields = _quoted_record(text, following(), taken, delimiter)
            if fields is None:
                returned.extendleft(reversed(taken))
                yield TableRow(at, [], MALFORMED_ROW)
            else:
                yield TableRow(at, fields)


def _quoted_record(
    text: str, following: Iterator[tuple[int, bytes]], taken: list[tuple[int, bytes]], delimiter: str
) -> list[str] | None:
    """Parse a record that begins with the line `text`, and add the further lines that it takes to `taken`."""

    def lines() -> Iterator[str]:
        yield text
        size = len(text)
        for at, line in following:
            taken.append((at, line))
            size += len(line)
            decoded, _ = decode(line)
            if decoded is None or size > LONGEST:
                return
            yield decoded

    try:
        # Strict, or a quote that is not closed would take the rest of the file.
        return next(csv.reader(lines(), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
