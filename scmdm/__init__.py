"""scmdm: masked diffusion models and their self-conditioning adaptation."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("scmdm")
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    # Imported on use: torch takes seconds to import, and `scmdm --help` does not need it.
    if name == "load":
        from scmdm.sampling.model_loading import load

        return load
    raise AttributeError(f"module 'scmdm' has no attribute {name!r}")
