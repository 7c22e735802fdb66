"""Configuration of `scmdm moses`."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.config.common import device_key
from scmdm.config.fields import key


@dataclass
class MosesConfig:
    """Keys of `scmdm moses`."""

    num: int | None = key(
        None,
        help="molecules to measure: the first of a file, or a fixed random subset of a published set; null: all",
        at_least=2,
        at_most=2**31,
    )
    detailed: int | None = key(
        30000,
        help="molecules for SNN, IntDiv, Filters and properties; null: all",
        at_least=2,
        at_most=2**31,
    )
    fcd: bool = key(True, help="Frechet ChemNet distance")
    out: str | None = key(None, help="JSON file to write; null: none")
    device: str = device_key()
    threads: int = key(0, help="worker processes; 0: one per core", at_least=0, at_most=1024)
