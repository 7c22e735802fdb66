"""The configuration of `scmdm moses`."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.errors import UserError


@dataclass
class MosesConfig:
    """What to measure of a set of molecules."""

    num: int | None = None  # the first of a file; of a published set some at random, always the same; null: all
    detailed: int | None = 30000  # SNN, IntDiv, Filters and properties are of so many of them; null: all
    fcd: bool = True  # Frechet ChemNet distance
    out: str | None = None  # JSON file; null: print alone
    device: str = "auto"  # of ChemNet and of similarities
    threads: int = 0  # processes; 0: as many as there are cores

    def validate(self) -> None:
        for name, least in (("num", 2), ("detailed", 2), ("threads", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} is not possible; it must be at least {least}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device={self.device!r} is not possible; it must be one of auto, cpu, cuda")
