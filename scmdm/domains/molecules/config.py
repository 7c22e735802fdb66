"""Keys of the molecule metrics, and the configuration of `scmdm moses`."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.config.fields import key
from scmdm.domains.interface import MetricKeys
from scmdm.system.package_data import package_folder


@dataclass
class MoleculeMetricKeys(MetricKeys):
    """Section `metrics` for models of molecules."""

    fcd: bool = key(False, help="Frechet ChemNet distance of 512 valid molecules")
    moses: bool = key(False, help="metrics of the benchmark MOSES, against its published test sets")

    @property
    def exclusive_setup(self) -> bool:
        """The statistics of the sets of MOSES are computed once per machine."""
        return self.moses

    def validate(self) -> None:
        if self.fcd:
            package_folder("fcd", "metrics.fcd=true", "molecules")


@dataclass
class MosesConfig:
    """Configuration of `scmdm moses`."""

    num: int | None = key(
        None, at_least=2, help="molecules to read; of a published set a fixed random selection; null: all"
    )
    detailed: int | None = key(
        30000, at_least=2, help="molecules for SNN, IntDiv, Filters and property distances; null: all"
    )
    fcd: bool = key(True, help="compute the Frechet ChemNet distance")
    out: str | None = key(None, help="JSON file to write; null: print only")
    device: str = key("auto", choices=("auto", "cpu", "cuda"), help="device of ChemNet and of similarities")
    threads: int = key(0, at_least=0, help="CPU threads and worker processes; 0: one per core")
