"""Memory of this machine, and failures to allocate it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CONTROL_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes() -> int:
    """Return the memory that this process can still take.

    On Linux, what the machine has as the kernel estimates it, or less where a control group (version 2), such as that
    of a container or of a SLURM job, has a limit; elsewhere, half of the machine's memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        of_machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([of_machine, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield what is left of the limit of this process's control group, and of each group around it that has one."""
    with contextlib.suppress(OSError):
        lines = _OWN_GROUP.read_text().splitlines()
        own = [_CONTROL_GROUPS / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
        for group in [folder for place in own for folder in (place, *place.parents)]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                limit = int((group / "memory.max").read_text())  # "max" without a limit
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(counts["inactive_file"])  # can be reclaimed
                yield max(0, limit - used)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether Python or torch could not allocate memory; torch has no class of its own for the CPU's memory."""
    return (
        isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) or "OutOfMemory" in type(error).__name__
    )
