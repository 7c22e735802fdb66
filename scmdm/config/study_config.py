"""The configuration of `scmdm study`: one base, several adaptations of it, compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from omegaconf import MISSING

from scmdm.config.loading import with_overrides
from scmdm.config.sampler import SamplerConfig, require_seeds
from scmdm.errors import UserError


@dataclass
class ArmConfig:
    """A row: an adaptation; or a training from scratch; or a trained arm, or the base, sampled in another way."""

    label: str = MISSING  # in figures and tables
    overrides: list[str] = field(default_factory=list)  # key=value of its training, after those of the study
    from_scratch: bool = False  # trained by base_config instead, on as many sequences as base and adaptation together
    samples_of: str | None = None  # no training: the arm, or `base`, whose models are sampled
    sampler: list[str] = field(default_factory=list)  # key=value of its sampler, after those of the study


@dataclass
class StudyConfig:
    """Arms from one base, at equal tokens unless an arm says otherwise; samples at equal denoiser evaluations."""

    title: str = MISSING
    out: str = MISSING  # study directory
    prepare: str = MISSING  # YAML of `scmdm prepare`
    base: str = MISSING  # model to start from, unless from_scratch
    base_config: str = MISSING  # YAML of `scmdm train` that made it
    from_scratch: bool = False  # train the base first
    adapt_config: str = MISSING  # YAML of `scmdm adapt`; the arms' overrides tell them apart
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)  # run these arms alone; none: all
    reference: str | None = None  # arm that the others are compared with; null: one with the largest rate
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
            (
                "steps",
                bool(self.steps) and min(self.steps) > 0 and len(set(self.steps)) == len(self.steps),
                "a list of numbers above 0, each once",
            ),
            ("num", self.num > 0, "above 0"),
            ("nelbo_samples", self.nelbo_samples > 0, "above 0"),
        ):
            if not ok:
                raise UserError(f"{key}={getattr(self, key)!r} is not possible; it must be {wanted}")
        require_seeds("adaptation_seeds", self.adaptation_seeds)
        require_seeds("sampling_seeds", self.sampling_seeds)
        for key, names in (("only", self.only), ("reference", [self.reference] if self.reference else [])):
            for name in names:
                if name not in self.arms:
                    raise UserError(f"{key}={name} is not possible; it must be one of {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            self._validate_arm(name, arm)
        self.sampler.validate()

    def _validate_arm(self, name: str, arm: ArmConfig) -> None:
        if self.sampler_of(name).steps != self.sampler.steps:
            raise UserError(f"arms.{name}.sampler sets steps, which are the study's: set steps=[...] for all arms")
        source = arm.samples_of
        if source is None:
            return
        trained = ["base", *(other for other, config in self.arms.items() if config.samples_of is None)]
        if source not in trained:
            raise UserError(f"arms.{name}.samples_of={source} is not possible; it must be one of {', '.join(trained)}")
        if arm.overrides or arm.from_scratch:
            raise UserError(
                f"arms.{name} has samples_of={source}, so that nothing is trained; leave overrides and from_scratch out"
            )

    def sampler_of(self, arm: str) -> SamplerConfig:
        """The sampler of an arm, or of the base."""
        if arm not in self.arms:
            return self.sampler
        return with_overrides(self.sampler, self.arms[arm].sampler, f"in arms.{arm}.sampler")

    def selected(self) -> StudyConfig:
        """The study of `only` those arms that were asked for, and the arms whose models they sample."""
        if not self.only:
            return self
        wanted = {*self.only, *(self.arms[name].samples_of for name in self.only)}
        return dataclasses.replace(self, arms={name: arm for name, arm in self.arms.items() if name in wanted})
