"""Where corpora that were fetched once stay."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """A directory of the user's cache; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scmdm" / name
