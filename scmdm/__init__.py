"""scmdm: masked diffusion models and their self-conditioning adaptation."""

from __future__ import annotations

import os
from importlib.metadata import version

__version__ = version("scmdm")
__all__ = ["__version__", "load"]

# On a CPU, oneDNN keeps the kernels of the last 1,024 shapes. The number of masked tokens differs in every step, so
# that the kernels of a small model grow to several GB. 64 hold those that are used again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def __getattr__(name: str) -> object:
    # Imported on use: torch takes seconds to import, and `scmdm --help` does not need it.
    if name == "load":
        from scmdm.sampling.model_loading import load

        return load
    raise AttributeError(f"module 'scmdm' has no attribute {name!r}")
