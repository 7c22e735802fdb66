"""`python -m benchmarks [part ...]`: run the named benchmarks; without names all but `gpu` and `trajectory`.

`gpu`, `scale` and `trajectory` have options of their own: they are named first, and alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks import (
    attention,
    blocks,
    checkpoint,
    engines,
    gpu,
    loader,
    memory,
    preparation,
    profile,
    samplers,
    scale,
    start,
    step,
    trajectory,
)

PARTS: dict[str, Callable[[], object]] = {
    "step": step.main,
    "small": step.small,
    "billion": step.billion,
    "published": step.published,
    "memory": memory.main,
    "head": step.head,
    "attention": attention.main,
    "engines": engines.main,
    "samplers": samplers.main,
    "sampler1024": samplers.thousand,
    "blocks": blocks.main,
    "caches": blocks.quality,
    "loader": loader.main,
    "preparation": preparation.main,
    "checkpoint": checkpoint.main,
    "start": start.main,
    "profile": profile.main,
    "scale": scale.main,
}
WITH_OPTIONS: dict[str, Callable[[list[str]], int]] = {
    "gpu": gpu.main,
    "scale": scale.main,
    "trajectory": trajectory.main,
}


def main(names: list[str]) -> int:
    """Run the named benchmarks; returns the exit status."""
    if names and names[0] in WITH_OPTIONS:
        return WITH_OPTIONS[names[0]](names[1:])
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        alone = [name for name in WITH_OPTIONS if name not in PARTS]
        allowed = f"it must be one of {', '.join(PARTS)}, or the first argument {' or '.join(alone)}"
        sys.exit(f"unknown benchmark {unknown[0]!r}; {allowed}")
    failed = [name for name in names or PARTS if PARTS[name]()]  # `scale` alone returns a status
    return int(bool(failed))


if __name__ == "__main__":  # `memory` spawns processes that import this module
    sys.exit(main(sys.argv[1:]))
