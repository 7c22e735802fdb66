"""Memory of this machine, and failures to allocate it."""

from __future__ import annotations

import os
from pathlib import Path


def available_bytes() -> int:
    """Return the memory that programs can still take: on Linux as the kernel estimates it, else half of all."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def is_out_of_memory(error: Exception) -> bool:
    """Return whether Python or torch could not allocate memory; torch has no class of its own for the CPU's memory."""
    return (
        isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) or "OutOfMemory" in type(error).__name__
    )
