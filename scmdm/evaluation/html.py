"""Elements of a self-contained HTML page: inline images and style, no scripts, light and dark mode."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

_LONGEST_NUMBER = 20  # characters
_CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.2rem }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
td { white-space: nowrap } td.words { white-space: normal }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid var(--line) }
tr.first td { border-top: 2px solid var(--line) }
img { max-width: 100%; background: white; border-radius: 6px; padding: 4px; box-sizing: border-box }
.note { color: GrayText; font-size: .9rem }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .85rem }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A complete HTML document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph; `note` selects small grey type."""
    return f'<p class="note">{escape(text)}</p>' if note else f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A bulleted list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, group: bool = False) -> str:
    """A table; with `group`, a line separates rows with different first cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body, previous = [], None
    for row in rows:
        mark = ' class="first"' if group and row[0] != previous else ""
        previous = row[0]
        body.append(f"<tr{mark}>" + "".join(map(_cell, row)) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(text: str) -> str:
    """A cell; words may be broken into lines, a value and its interval may not."""
    words = len(text) > _LONGEST_NUMBER and "[" not in text
    return f'<td class="words">{escape(text)}</td>' if words else f"<td>{escape(text)}</td>"


def picture(path: Path, caption: str) -> str:
    """A figure with an embedded PNG file."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure>{image}<figcaption class="note">{escape(caption)}</figcaption></figure>'


def preformatted(text: str) -> str:
    """Text in a fixed-width font, with its line breaks."""
    return f"<pre>{escape(text)}</pre>"
