"""The configuration of `scmdm study`: one base, several adaptations of it, compared."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from scmdm.config.sampling import SamplerConfig
from scmdm.errors import UserError


@dataclass
class ArmConfig:
    label: str = MISSING  # in figures and tables
    rate: float = MISSING  # self_conditioning.rate


@dataclass
class StudyConfig:
    """Arms at equal tokens from one base; samples at equal denoiser evaluations."""

    title: str = MISSING
    out: str = MISSING  # study directory
    prepare: str = MISSING  # YAML of `scmdm prepare`
    base: str = MISSING  # model to start from, unless from_scratch
    base_config: str = MISSING  # YAML of `scmdm train` that made it
    from_scratch: bool = False  # train the base first
    adapt_config: str = MISSING  # YAML of `scmdm adapt`, the same for all arms but for the rate
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    adaptation_seeds: list[int] = field(default_factory=lambda: [0])
    sampling_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: list[int] = field(default_factory=lambda: [8, 16, 32, 64])  # T
    num: int = 1024  # samples per seed
    nelbo_samples: int = 2048
    split: str = "test"  # what samples and NELBO are measured against
    fcd: bool = False  # molecules: Frechet ChemNet distance
    moses: bool = False  # molecules: MOSES' metrics, against its published test sets
    scorer: str | None = None  # text: directory of a transformers causal model; null: n-gram model on held-out text
    mauve: bool = False  # text: MAUVE in the scorer's features
    inception: str | None = None  # images: file of Inception's weights, for FID; null: a classifier trained here
    overrides: list[str] = field(default_factory=list)  # key=value for every adaptation
    base_overrides: list[str] = field(default_factory=list)  # key=value for the base's training
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        for key, ok, wanted in (
            ("arms", bool(self.arms) and "base" not in self.arms, "at least one arm, none of them called base"),
            ("steps", bool(self.steps) and min(self.steps) > 0, "a list of numbers above 0"),
            ("adaptation_seeds", bool(self.adaptation_seeds), "a list of at least one seed"),
            ("sampling_seeds", bool(self.sampling_seeds), "a list of at least one seed"),
            ("num", self.num > 0, "above 0"),
            ("nelbo_samples", self.nelbo_samples > 0, "above 0"),
        ):
            if not ok:
                raise UserError(f"{key}={getattr(self, key)!r} is not possible; it must be {wanted}")
        for name, arm in self.arms.items():
            if not 0 <= arm.rate <= 1:
                raise UserError(f"arms.{name}.rate={arm.rate} is not possible; it must be between 0 and 1")
        self.sampler.validate()
