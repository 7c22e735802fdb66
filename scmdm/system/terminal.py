"""Text on the terminal: what comes from files and names is shown as it is, never interpreted.

Control characters could move the cursor or change the terminal, `[...]` in a name is markup to rich, and a terminal's
encoding may lack a letter. None of them may lose a result that took hours.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile(r"[\t\n]")


def printable(text: object, *, keep_lines: bool = False) -> str:
    """Return one line with control characters and halves of surrogate pairs as escapes; with `keep_lines`, several."""
    found = _CONTROL.sub(_escape, str(text))
    return found if keep_lines else _BREAKS.sub(_escape, found)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def say(text: object) -> None:
    """Print text that may contain what others wrote, with control characters as escapes."""
    print(printable(text, keep_lines=True))


class Terminal(Console):
    """Rich console that prints strings literally: no markup, no emoji codes, no highlighting, no control characters.

    Use `style=` or `rich.text.Text` for colours.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, as in a cell of a table, to text."""
        options = {**options, "markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text, keep_lines=True), **options)


def accept_any_text() -> None:
    """Let standard output and error replace letters that their encoding lacks by escapes, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Send what is left of standard output nowhere, after its reader is gone: Python flushes it once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
