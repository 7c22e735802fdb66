"""Hostile changes of files: bits, bytes, words, values of JSON, and things in the place of files."""

import json
import os
from pathlib import Path
from random import Random

VICTIM = "victim.txt"  # stands beside every subject and must never change

WORDS = (
    *("", "null", "[]", "{}", "true", "-1", "0", "NaN", "Infinity", "1e999", "1e30", "9223372036854775808"),
    *("9" * 5000, "[" * 2000, '{"a":' * 500, "\0", "\ud800", "\\ud800", "\r", "\n", "\ufeff", "\x1b[31m", "a[/red]b"),
    *(
        f"../{VICTIM}",
        f"../../{VICTIM}",
        "/etc/passwd",
        "a\\b",
        "${oc.env:HOME}",
        "???",
        "&a [*a]",
        "- - -",
        "'",
        '"',
        "%",
    ),
    *("'", '"', "%", "<|mask|>", "[MASK]", "C" * 3000, "\U0010ffff", "é", ">", ";", "#", ",", "\t"),
)
VALUES = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, 1e308, "", [], {}, [[]], [None], {"": {}}),
    *(f"../{VICTIM}", f"../../{VICTIM}", "/etc/passwd", ".", "..", "a/../../b", "a\0b", "x" * 10_000, "${oc.env:HOME}"),
    *("float32", "auto", "nan", "1e999", "-1"),
)


def mutate(file: Path, dice: Random) -> str:
    """Change `file` in one way, and return a description."""
    ways = [_flip, _flip, _insert, _delete, _truncate, _word, _word, _replace, _special]
    if _parsed(file) is not None:
        ways += [_value, _value, _value, _key, _key]
    return dice.choice(ways)(file, dice)


def _flip(file: Path, dice: Random) -> str:
    content = bytearray(file.read_bytes() or b"\0")
    # Flips near the ends find headers and indexes more often.
    position = dice.choice([dice.randrange(len(content)), min(dice.randrange(64), len(content) - 1)])
    bit = dice.randrange(8)
    content[position] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {position}"


def _insert(file: Path, dice: Random) -> str:
    content = file.read_bytes()
    position = dice.randint(0, len(content))
    added = dice.randbytes(dice.randint(1, 20))
    file.write_bytes(content[:position] + added + content[position:])
    return f"{added!r} at {position}"


def _delete(file: Path, dice: Random) -> str:
    content = file.read_bytes()
    start = dice.randint(0, len(content))
    end = min(len(content), start + dice.choice([1, 2, 10, 1000]))
    file.write_bytes(content[:start] + content[end:])
    return f"without bytes {start} to {end}"


def _truncate(file: Path, dice: Random) -> str:
    length = dice.randint(0, file.stat().st_size)
    os.truncate(file, length)
    return f"cut to {length} bytes"


def _word(file: Path, dice: Random) -> str:
    content, word = file.read_bytes(), dice.choice(WORDS)
    position = dice.randint(0, len(content))
    kept = position + dice.choice([0, 0, 1, 5])
    file.write_bytes(content[:position] + word.encode(errors="surrogatepass") + content[kept:])
    return f"{word[:40]!r} at {position}"


def _replace(file: Path, dice: Random) -> str:
    word = dice.choice(WORDS)
    file.write_bytes(word.encode(errors="surrogatepass"))
    return f"replaced by {word[:40]!r}"


def _special(file: Path, dice: Random) -> str:
    kind = dice.choice(["fifo", "folder", "loop", "absent", "device", "outside"])
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "outside":
        file.symlink_to("/etc/passwd")
    return f"{kind} in its place"


def _parsed(file: Path) -> object:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


def _places(content: object) -> list[tuple[object, object]]:
    """Every (container, key or index) of parsed JSON."""
    children = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    found = [(content, key) for key, _ in children]
    return found + [place for _, child in children if isinstance(child, dict | list) for place in _places(child)]


def _value(file: Path, dice: Random) -> str:
    content, value = [_parsed(file)], dice.choice(VALUES)
    container, key = dice.choice(_places(content))
    container[key] = value
    file.write_text(json.dumps(content[0]))
    return f"{str(key)[:40]} is {str(value)[:40]!r}"


def _key(file: Path, dice: Random) -> str:
    content = [_parsed(file)]
    mappings = [container for container, _ in _places(content) if isinstance(container, dict)]
    if not mappings:
        return _replace(file, dice)
    mapping = dice.choice(mappings)
    key, way = dice.choice(list(mapping)), dice.choice(["removed", "renamed", "added"])
    value = mapping.pop(key) if way != "added" else 1
    if way != "removed":
        mapping[f"{key}_"] = value
    file.write_text(json.dumps(content[0]))
    return f"key {key[:40]} {way}"
