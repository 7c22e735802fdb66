"""Configuration of `scmdm study`: one base, several adaptations of it, compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from scmdm.config.common import LARGEST_SEED, check_compile, compile_key, shards_key, weights_dtype_key
from scmdm.config.evaluation import MOVED_METRIC_KEYS, require_distinct
from scmdm.config.fields import PathKind, is_path, key, require
from scmdm.config.loading import with_overrides
from scmdm.config.sampling import SamplerConfig
from scmdm.errors import UserError

HELD_OUT = "held out"  # label of the held-out data in figures
DISTRIBUTIONS = "distributions"  # name of the figure of all arms' distributions, where those of an arm have its name
_LONGEST_ARM = 128  # bytes of a name, to which names of files add seeds and the number of steps


@dataclass
class ArmConfig:
    """A compared model: an adaptation, a model trained from scratch, or another way to sample a trained model."""

    label: str = key(MISSING, help="name in figures and tables")
    overrides: list[str] = key(factory=list, help="key=value of its training, applied after those of the study")
    from_scratch: bool = key(
        False, help="train it with base_config, on as many sequences as base and adaptation together"
    )
    samples_of: str | None = key(None, help="do not train: sample the models of this arm, or of `base`")
    sampler: list[str] = key(factory=list, help="key=value of its sampler, applied after those of the study")


@dataclass
class StudyConfig:
    """Keys of `scmdm study`.

    Arms are compared at equal numbers of training tokens, unless their overrides say otherwise, and at equal numbers of
    denoiser evaluations.
    """

    removed_keys: ClassVar[dict[str, str]] = MOVED_METRIC_KEYS

    title: str = key(MISSING, help="title of the report")
    out: str = key(MISSING, path=PathKind.OUTPUT, help="study directory")
    prepare: str = key(MISSING, path=PathKind.INPUT, help="YAML file of `scmdm prepare`")
    base: str = key(
        MISSING, path=PathKind.INPUT, help="model that the arms adapt; not used with from_scratch, which makes its own"
    )
    base_config: str = key(MISSING, path=PathKind.INPUT, help="YAML file of `scmdm train` that made the base")
    from_scratch: bool = key(False, help="train a base in OUT/base first, and adapt that instead of `base`")
    adapt_config: str = key(MISSING, path=PathKind.INPUT, help="YAML file of `scmdm adapt`, common to all arms")
    arms: dict[str, ArmConfig] = key(factory=dict, help="NAME: {label, overrides, ...} of each compared model")
    only: list[str] = key(factory=list, help="names of the arms to run; empty: all")
    reference: str | None = key(
        None, help="arm that the others are compared with; null: one with the largest self_conditioning.rate"
    )
    metric: str | None = key(None, help="metric by which the arms are compared; null: the first of the domain")
    adaptation_seeds: list[int] = key(factory=lambda: [0], help="seeds of training", at_least=0, at_most=LARGEST_SEED)
    sampling_seeds: list[int] = key(
        factory=lambda: [0, 1, 2], help="seeds of sampling", at_least=0, at_most=LARGEST_SEED
    )
    steps: list[int] = key(
        factory=lambda: [8, 16, 32, 64], help="sampling steps T to compare at", at_least=1, at_most=2**31
    )
    num: int = key(1024, help="samples per seed", at_least=1, at_most=2**24)
    nelbo_samples: int = key(2048, help="sequences for the NELBO", at_least=1, at_most=2**40)
    split: str = key("test", help="held-out split for the NELBO and for reference statistics")
    weights_dtype: str = weights_dtype_key()
    shards: int = shards_key()
    compile: str = compile_key()
    metrics: dict[str, Any] = key(
        factory=dict,
        help="keys of the domain, as in metrics.fcd=true for molecules or metrics.scorer=DIR for text",
        keys_of="scmdm.domains.domain_registry:DOMAINS",
    )
    overrides: list[str] = key(factory=list, help="key=value of every adaptation")
    base_overrides: list[str] = key(
        factory=list, help="key=value of every training by base_config: the base's, arms from scratch"
    )
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        """Raise UserError for a combination of keys that cannot work."""
        named = bool(self.arms) and "base" not in self.arms
        require(named, "arms", list(self.arms), "at least one arm, none of them named base")
        for name in ("steps", "adaptation_seeds", "sampling_seeds"):
            require_distinct(name, getattr(self, name))
        for name in self.only:
            require(name in self.arms, "only", name, f"one of {', '.join(self.arms)}")
        selected = self.selected().arms
        check_arms([("base", "base"), *((name, arm.label) for name, arm in selected.items())])
        compared = self.reference is None or self.reference in selected
        require(compared, "reference", self.reference, f"one of {', '.join(selected)}, the arms of this study")
        for name, arm in self.arms.items():
            self._validate_arm(name, arm)
        by_base_config = self.from_scratch or any(arm.from_scratch for arm in self.arms.values())
        unused = "left out: without from_scratch, of the study or of an arm, nothing is trained by base_config"
        require(by_base_config or not self.base_overrides, "base_overrides", self.base_overrides, unused)
        check_compile(self.compile, self.shards)
        unset = self.sampler.steps == SamplerConfig().steps
        require(unset, "sampler.steps", self.sampler.steps, "left out of a study; set steps=[...]")
        self.sampler.validate()
        own = [name for name in ("base", *selected) if self.sampler_of(name).own_length]
        once = f"one number: {', '.join(own)} would be sampled in the same way at each, because the sampler ignores it"
        require(not own or len(self.steps) == 1, "steps", self.steps, once)

    def _validate_arm(self, name: str, arm: ArmConfig) -> None:
        if self.sampler_of(name).steps != self.sampler.steps:
            raise UserError(
                f"arms.{name}.sampler sets steps, which are common to all arms: leave it out, and set steps=[...]"
            )
        source = arm.samples_of
        if source is None:
            return
        trained = ["base", *(other for other, config in self.arms.items() if config.samples_of is None)]
        require(source in trained, f"arms.{name}.samples_of", source, f"one of {', '.join(trained)}")
        if arm.overrides or arm.from_scratch:
            raise UserError(
                f"arms.{name} is not trained, because it has samples_of={source}; leave overrides and from_scratch out"
            )

    def sampler_of(self, arm: str) -> SamplerConfig:
        """Return the sampler of an arm, or of the base."""
        if arm not in self.arms:
            return self.sampler
        return with_overrides(self.sampler, self.arms[arm].sampler, f"in arms.{arm}.sampler")

    def selected(self) -> StudyConfig:
        """Return the study restricted to the arms of `only` and the arms whose models they sample."""
        if not self.only:
            return self
        wanted = {*self.only, *(self.arms[name].samples_of for name in self.only)}
        return dataclasses.replace(self, arms={name: arm for name, arm in self.arms.items() if name in wanted})


def check_arms(arms: Iterable[tuple[str, str]]) -> None:
    """Raise UserError unless a report can tell arms apart, each given as (name, label).

    Names are parts of file names; labels are the keys of tables and figures, which also show the held-out data.
    """
    names: set[str] = set()
    labels = {HELD_OUT}
    for name, label in arms:
        plain = is_path(name) and "/" not in name and name not in (".", "..", DISTRIBUTIONS)
        short = plain and len(name.encode()) <= _LONGEST_ARM
        wanted = (
            f"a name that no other arm has, and a file name: without /, of at most {_LONGEST_ARM} bytes, not "
            f"{DISTRIBUTIONS}"
        )
        require(short and name not in names, "arms", name, wanted)
        shown = label.strip()
        wanted = f"text that is not blank, not one of {', '.join(sorted(labels))}, and does not begin with _"
        seen = bool(shown) and not label.startswith("_")  # matplotlib leaves such labels out of legends
        require(seen and shown not in labels, f"arms.{name}.label", label, wanted)
        names.add(name)
        labels.add(shown)
