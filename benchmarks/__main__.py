"""`python -m benchmarks [part ...]`: run all benchmarks, or those named.

`gpu`, `scale` and `trajectory` have options of their own.
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


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all without names; returns the exit status."""
    if names[:1] == ["gpu"]:
        return gpu.main(names[1:])
    if names[:1] == ["scale"]:
        return scale.main(names[1:])
    if names[:1] == ["trajectory"]:
        return trajectory.main(names[1:])
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; it must be one of {', '.join(PARTS)}")
    for name in names or PARTS:
        PARTS[name]()
    return 0


if __name__ == "__main__":  # `memory` spawns processes that import this module
    sys.exit(main(sys.argv[1:]))
