"""Configuration of `scmdm evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from scmdm.config import fields
from scmdm.config.common import (
    LARGEST_SEED,
    batch_size_key,
    check_compile,
    compile_key,
    device_key,
    precision_key,
    resolve_weights_dtype,
    shards_key,
    threads_key,
    verify_key,
    weights_dtype_key,
    weights_key,
)
from scmdm.config.fields import PathKind, key, require
from scmdm.config.loading import read_config
from scmdm.config.preparation import TEXT_DETOKENIZERS, TEXT_UNITS
from scmdm.config.sampling import SamplerConfig

MOVED_METRIC_KEYS = {name: f"write `metrics.{name}`" for name in ("fcd", "moses", "scorer", "mauve", "inception")}


@dataclass
class ZeroShotConfig:
    """Texts that a model was not trained on."""

    path: str = fields.key(MISSING, path=PathKind.INPUT, help="file or folder")
    key: str = fields.key("text", help="key or column of the text")
    unit: str = fields.key("documents", help="records to split files into", choices=TEXT_UNITS)
    detokenize: str = fields.key("none", help="corpus whose tokenized spacing is undone", choices=TEXT_DETOKENIZERS)
    end_marks: bool = fields.key(
        True, help="[EOS] behind each record of a model of blocks; false: none, as Duo's zero-shot script"
    )
    group: int | None = fields.key(
        None,
        help="records per group; no block crosses groups, and tokens left over at the end of a group are dropped "
        "(MDLM's code: groups of 1000 in one process); null: one group",
        at_least=1,
        at_most=2**40,
    )


@dataclass
class EvaluateConfig:
    """Keys of `scmdm evaluate`."""

    removed_keys: ClassVar[dict[str, str]] = MOVED_METRIC_KEYS

    data: str | None = key(None, path=PathKind.INPUT, help="data set; null: the one that the model was trained on")
    domain: str = key("auto", help="domain whose metrics are computed; auto: that of the data set")
    split: str = key("test", help="held-out split for the NELBO and for reference statistics")
    nelbo_samples: int = key(2048, help="sequences for the NELBO; 0: no NELBO", at_least=0, at_most=2**40)
    nelbo_draws: int = key(4, help="times drawn per sequence", at_least=1, at_most=2**20)
    nelbo_passes: int = key(
        1,
        help="passes that make the estimate of the conditioned NELBO, each conditioned on the one before",
        at_least=1,
        at_most=64,
    )
    t_min: float = key(1e-4, help="smallest time of the NELBO", above=0, below=0.5)
    nelbo_padding: bool = key(
        True,
        help="count padding in the NELBO of a model that was trained to predict it; false: padding is masked, but does "
        "not count, as in the published perplexity of QM9",
    )
    padding: str | None = key(
        None,
        help="length of padded sequences in the NELBO: that of the data; sample: each its own; null: sample for a run "
        "with train.padding=batch or sample, else length",
        choices=("length", "sample"),
    )
    pad_multiple: int | None = key(
        None,
        help="padding=sample: lengths are rounded up to multiples of this; null: train.pad_multiple of the run",
        at_least=1,
        at_most=2**20,
    )
    num: int = key(1024, help="samples per seed; 0: no samples", at_least=0, at_most=2**24)
    gen_length: int | None = key(
        None,
        help="responses: tokens drawn after each prompt, at most up to the length of the data; null: that length, or "
        "with padding=sample as many as the longest of the held-out responses has, rounded up",
        at_least=1,
        at_most=2**24,
    )
    seeds: list[int] = key(
        factory=lambda: [0], help="seeds, one draw of num samples each", at_least=0, at_most=LARGEST_SEED
    )
    batch_size: int | None = batch_size_key()
    metrics: dict[str, Any] = key(
        factory=dict,
        help="keys of the domain, as in metrics.fcd=true for molecules or metrics.scorer=DIR for text",
        keys_of="scmdm.domains.domain_registry:DOMAINS",
    )
    texts: dict[str, Any] = key(
        factory=dict,
        help="zero-shot perplexity, NAME: file or folder of text, or {path: ..., key: ..., unit: ..., detokenize: ..., "
        "end_marks: ..., group: ...}",
    )
    out: str | None = key(
        None,
        path=PathKind.OUTPUT,
        help="JSON file; null: in evaluations/ of the run, or in evaluations/MODEL here for a model without a run",
    )
    weights: str = weights_key()
    verify: str = verify_key()
    device: str = device_key()
    precision: str = precision_key()
    weights_dtype: str = weights_dtype_key()
    shards: int = shards_key()
    compile: str = compile_key()
    threads: int = threads_key()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        """Raise UserError for a combination of keys that cannot work."""
        require_distinct("seeds", self.seeds)
        anything = bool(self.num or self.nelbo_samples or self.texts)
        require(anything, "num", self.num, "above 0 with nelbo_samples=0 and no texts: nothing would be measured")
        self.zero_shot_texts()
        resolve_weights_dtype(self.weights_dtype, self.precision)
        check_compile(self.compile, self.shards)
        self.sampler.validate()

    def zero_shot_texts(self) -> dict[str, ZeroShotConfig]:
        """Return the corpora of `texts` by name. Raises UserError for an unknown key or an impossible value."""
        found = {}
        for name, value in self.texts.items():
            keys = {"path": value} if isinstance(value, str) else value
            require(isinstance(keys, dict), f"texts.{name}", value, "a path, or {path: ..., key: ...}")
            found[name] = read_config(ZeroShotConfig, keys, f"in texts.{name}")
        return found


def require_distinct(name: str, numbers: Sequence[int]) -> None:
    """Raise UserError unless the key `name` lists at least one number, all of them distinct."""
    distinct = len(numbers) > 0 and len(set(numbers)) == len(numbers)
    require(distinct, name, list(numbers), "a list of at least one number, without repetitions")
