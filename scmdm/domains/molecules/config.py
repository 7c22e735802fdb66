"""Keys of the molecule metrics, and the configuration of `scmdm moses`."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.config.common import device_key
from scmdm.config.fields import PathKind, key
from scmdm.domains.interface import MetricKeys
from scmdm.system.package_data import package_folder
from scmdm.system.worker_processes import MAX_WORKERS


@dataclass
class MoleculeMetricKeys(MetricKeys):
    """Section `metrics` for models of molecules."""

    fcd: bool = key(False, help="Frechet ChemNet distance of 512 valid molecules")
    moses: bool = key(False, help="metrics of the benchmark MOSES, against its published test sets")

    @property
    def exclusive_setup(self) -> bool:
        """True with `moses`: statistics of its sets are computed once per machine."""
        return self.moses

    def validate(self) -> None:
        if self.fcd:
            package_folder("fcd", "metrics.fcd=true", "molecules")


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
    out: str | None = key(None, path=PathKind.OUTPUT, help="JSON file to write; null: none")
    device: str = device_key()
    threads: int = key(
        0,
        help=f"worker processes, each of which has torch in memory; 0: one per core, at most {MAX_WORKERS}",
        at_least=0,
        at_most=MAX_WORKERS,
    )
