"""The keys of a configuration as text for `--help`: name, default and its comment in the source."""

from __future__ import annotations

import dataclasses
import inspect
import re

_FIELD = re.compile(r"^    (\w+):.*?(?:  # (.*))?$")


def describe_keys(schema: type, prefix: str = "") -> str:
    """One line per key, sections in order."""
    comments = _comments(schema)
    lines = []
    for field in dataclasses.fields(schema):
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            lines.append(describe_keys(field.default_factory, f"{prefix}{field.name}."))
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = {"???": "required", "None": "null", "True": "true", "False": "false"}.get(str(default), str(default))
        lines.append(f"  {prefix + field.name + '=' + shown:<44} {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines)


def _comments(schema: type) -> dict[str, str]:
    """By name of a field what stands behind it, or else on the lines before it."""
    found: dict[str, str] = {}
    before: list[str] = []
    for line in inspect.getsource(schema).splitlines():
        if match := _FIELD.match(line):
            found[match[1]] = match[2] or " ".join(before)
        before = [*before, line.strip(" #")] if line.startswith("    # ") else []
    return found
