"""`python -m benchmarks [part ...]`: all parts, or the named ones."""

from __future__ import annotations

import sys

from benchmarks import attention, checkpoint, engines, step

PARTS = {"step": step.main, "attention": attention.main, "engines": engines.main, "checkpoint": checkpoint.main}


def main(names: list[str]) -> None:
    """Run the parts; an unknown name ends with those that exist."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; there are {', '.join(PARTS)}")
    for name in names or PARTS:
        PARTS[name]()


main(sys.argv[1:])
