"""Files of one JSON value per line: a damaged line is skipped and counted, the others are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from scmdm.system.untrusted import describe, require_regular

Row = TypeVar("Row")
_LONGEST_LINE = 2**24  # bytes; longer lines are skipped without being held in memory
_SHOWN_NUMBERS = 8


@dataclass(frozen=True)
class JsonLines(Generic[Row]):
    """The readable rows of a file, and the numbers of its other lines, counted from 1."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    unreadable: str = ""  # why the file as a whole cannot be read

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def problem(self) -> str | None:
        """One line that names the file and its damaged lines; None if everything was read."""
        if self.unreadable:
            return f"{self.path} cannot be read ({self.unreadable}); its rest is left out"
        if not self.damaged:
            return None
        shown = ", ".join(str(number) for number in self.damaged[:_SHOWN_NUMBERS])
        more = f" and {len(self.damaged) - _SHOWN_NUMBERS} more" if len(self.damaged) > _SHOWN_NUMBERS else ""
        return f"{self.path}: {len(self.damaged)} damaged line(s) are left out: {shown}{more}"


def read_json_lines(path: Path, parse: Callable[[bytes], Row]) -> JsonLines[Row]:
    """Read a file line by line; a line that is too long, or that `parse` refuses with any exception, is damaged.

    A missing file has no rows, and empty lines are skipped. Lines end with a newline alone: the text of a sample may
    hold other line separators.
    """
    found: JsonLines[Row] = JsonLines(path)
    try:
        require_regular(path)
        with path.open("rb") as file:
            for number, line in enumerate(_bounded_lines(file), start=1):
                try:
                    if line is None:
                        found.damaged.append(number)
                    elif line.strip():
                        found.rows.append(parse(line))
                except Exception:  # noqa: BLE001 - a parser of outside data can raise any class
                    found.damaged.append(number)
    except FileNotFoundError:
        return found
    except OSError as error:
        return JsonLines(path, found.rows, found.damaged, describe(error))
    return found


def _bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield every line, None for one that is too long."""
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) <= _LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
            pass
        yield None
