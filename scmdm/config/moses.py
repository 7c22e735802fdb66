"""The configuration of `scmdm moses`."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.errors import UserError


@dataclass
class MosesConfig:
    """How molecules of a file are measured."""

    fcd: bool = True  # Frechet ChemNet distance, by the package fcd
    workers: int = 0  # processes; 0: one for each core
    means_of: int = 30_000  # molecules, evenly spaced, of which SNN, IntDiv, filters and properties are means
    device: str = "auto"  # of the similarities
    out: str | None = None  # JSON file

    def validate(self) -> None:
        for key, least in (("workers", 0), ("means_of", 2)):
            if getattr(self, key) < least:
                raise UserError(f"{key}={getattr(self, key)} is not possible; it must be at least {least}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device={self.device!r} is not possible; it must be one of auto, cpu, cuda")
