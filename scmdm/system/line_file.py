"""An append-only text file whose lines wait in memory while the disk is full."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path
from threading import RLock

from scmdm.system.lease import Fence

_MOST_WAITING = 100_000  # lines; the oldest is lost when there are more


class LineFile:
    """Append-only file of whole lines.

    A line that cannot be written waits and is written, in order, with a later line or on closing. A part of a line that
    reached the disk is cut off again, so that the file always ends with a whole line. With a `fence`, lines are dropped
    once another process has taken the directory over.
    """

    def __init__(self, path: Path, fence: Fence | None = None) -> None:
        self.path, self._fence = path, fence
        self.lost = 0  # lines that waited and were given up
        self._waiting: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._lock = RLock()

    @property
    def waiting(self) -> int:
        """Number of lines that wait."""
        return len(self._waiting)

    def write(self, line: str) -> OSError | None:
        """Append a line, after all that wait; returns the error if lines wait afterwards."""
        with self._lock:
            self._waiting.append(line.removesuffix("\n").encode(errors="backslashreplace") + b"\n")
            error = self._write_waiting()
            while len(self._waiting) > _MOST_WAITING:
                self._waiting.popleft()
                self.lost += 1
            return error

    def close(self) -> OSError | None:
        """Write the lines that wait and close the file; returns the error if that is not possible."""
        with self._lock:
            error = self._write_waiting()
            self.lost += len(self._waiting)
            self._waiting.clear()
            if self._descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(self._descriptor)
                self._descriptor = None
            return error

    def _write_waiting(self) -> OSError | None:
        try:
            if self._waiting and self._fence is not None and not self._fence.still_owned():
                self.lost += len(self._waiting)
                self._waiting.clear()
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            return error
        return None

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        end = os.fstat(self._descriptor).st_size
        done = 0
        try:
            while done < len(line):
                done += os.write(self._descriptor, line[done:])
        except OSError:
            if done:
                os.ftruncate(self._descriptor, end)
            raise
