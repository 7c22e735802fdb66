"""The configurations of `scmdm sample` and `scmdm evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from scmdm.config.loading import read_config
from scmdm.config.preparation import CHOICES
from scmdm.diffusion.reveal_order import ORDERS, SamplerSettings
from scmdm.errors import UserError

_MOST_SHOWN = 1024  # steps on the demo's page
_FORMATS = (".jsonl", ".txt", ".smi", ".fasta", ".fa", ".png", ".npy")


@dataclass
class SamplerConfig:
    kind: str = "ancestral"  # ancestral | first_hitting | confidence | margin | entropy (the most certain first)
    steps: int = 32  # denoiser evaluations; first_hitting makes one per token
    block_length: int | None = None  # semi-autoregressive: so many positions after the other; steps are for all of them
    remask: str = "never"  # ancestral: never | cap | rescale (ReMDM: revealed tokens are taken back)
    remask_eta: float = 0.02  # cap: largest probability of that; rescale: part of the largest possible one
    remasked_estimate: str = "token"  # what a taken-back token leaves in the carried estimate: token (itself) | null
    temperature: float = 1.0  # 0: most probable token
    top_k: int | None = None  # draw among so many most probable tokens; null: all
    top_p: float = 1.0  # nucleus
    gumbel: str = "float64"  # float64 | float32 (the truncated draw of older code)
    label: str | None = None  # class of the samples, of a model with labels; each: all classes in turn; null: none
    guidance: float = 1.0  # classifier-free: 1 none, more: further towards the label, at two evaluations a step
    carry: str = "auto"  # auto (when the model is self-conditioned) | always | never
    cuda_graphs: bool = False  # a GPU replays evaluations of a repeated shape: faster for small batches

    def settings(self, self_conditioned: bool) -> SamplerSettings:
        """The pure sampler's settings for a model; UserError when the model cannot carry an estimate."""
        if self.carry == "always" and not self_conditioned:
            raise UserError(
                "sampler.carry=always, but the model is not self-conditioned; adapt it, or use sampler.carry=auto"
            )
        settings = {**asdict(self), "carry": self_conditioned and self.carry != "never"}
        for name in ("label", "cuda_graphs"):  # which sequences it is for, and who computes, is not its business
            del settings[name]
        return SamplerSettings(**settings)

    def check_length(self, length: int) -> None:
        """UserError when sequences of this length have more blocks than there are steps."""
        blocks = -(-length // (self.block_length or length))
        if self.kind != "first_hitting" and self.steps < blocks:
            raise UserError(
                f"sampler.steps={self.steps} is not possible with sampler.block_length={self.block_length}: a sequence "
                f"of {length} has {blocks} blocks, and each needs a step"
            )

    def validate(self) -> None:
        allowed = {
            "kind": ("ancestral", "first_hitting", *ORDERS),
            "remask": ("never", "cap", "rescale"),
            "remasked_estimate": ("token", "null"),
            "gumbel": ("float64", "float32"),
            "carry": ("auto", "always", "never"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise UserError(f"sampler.{name}={value!r} is not possible; it must be one of {', '.join(choices)}")
        for name, ok, wanted in (
            ("steps", self.steps >= 1, "at least 1"),
            ("block_length", self.block_length is None or self.block_length >= 1, "at least 1, or null"),
            ("block_length", self.block_length is None or self.kind != "first_hitting", "null with kind=first_hitting"),
            ("remask", self.remask == "never" or self.kind == "ancestral", f"never with kind={self.kind}"),
            ("remask_eta", 0 <= self.remask_eta <= 1, "between 0 and 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or null"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("guidance", self.guidance >= 0, "0 or more"),
            ("guidance", self.guidance == 1 or self.label is not None, "1 without sampler.label"),
        ):
            if not ok:
                raise UserError(f"sampler.{name}={getattr(self, name)!r} is not possible; it must be {wanted}")


@dataclass
class SampleConfig:
    """What to sample."""

    num: int = 16
    length: int | None = None  # null: as the training data
    batch_size: int | None = None  # samples at once; null: 64 on each CPU core, 1024 on a GPU
    seed: int = 0
    prompt: str | None = None  # text that every sample starts with
    prompts: str | None = None  # file with a prompt a line (.jsonl: {"prompt": TEXT}): `num` samples for each
    infill: str | None = None  # whole text, with [MASK] for each token to fill in
    out: str | None = None  # file: .jsonl (all there is to say), .txt, .smi, .fasta, .png, .npy (codes); null: print
    weights: str = "ema"  # ema | raw
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        given = [key for key in ("prompt", "prompts", "infill") if getattr(self, key) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are both set; give one of them")
        if self.out is not None and not self.out.endswith(_FORMATS):
            raise UserError(f"out={self.out} is not possible; its name must end in one of {', '.join(_FORMATS)}")
        for name, least in (("num", 1), ("batch_size", 1), ("length", 1), ("seed", 0), ("threads", 0)):
            _require_least(self, name, least)
        _check_place(self.weights, self.device, self.precision)
        self.sampler.validate()


@dataclass
class DenoiseConfig:
    """What the page of `scmdm demo` asks for: one sample, step by step."""

    seed: int = 0
    prompt: str | None = None  # text that the sample starts with
    infill: str | None = None  # whole text, with [MASK] for each token to fill in
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        if self.prompt is not None and self.infill is not None:
            raise UserError("prompt and infill are both set; give one of them")
        if not 0 <= self.seed <= 2**62:
            raise UserError(f"seed={self.seed} is not possible; it must be between 0 and 2^62")
        self.sampler.validate()
        if self.sampler.steps > _MOST_SHOWN:
            raise UserError(f"sampler.steps={self.sampler.steps} are too many to look at; give {_MOST_SHOWN} or less")


@dataclass
class ZeroShotConfig:
    """Texts that a model was not trained on, as `scmdm prepare` reads them."""

    path: str = MISSING  # file or folder
    key: str = "text"  # of a row
    unit: str = "documents"  # passages | documents | lines
    detokenize: str = "none"  # none | wikitext | lm1b | ptb | lambada | scientific_papers

    def validate(self) -> None:
        for key in ("unit", "detokenize"):
            choices = tuple(map(str, CHOICES[key]))
            if getattr(self, key) not in choices:
                raise UserError(f"{key}={getattr(self, key)!r} is not possible; it must be one of {', '.join(choices)}")


@dataclass
class EvaluateConfig:
    """What to measure, and how."""

    data: str | None = None  # data set; null: the one the model was trained on, if it is still there
    domain: str = "auto"  # auto | molecules | text | responses | genomes | images | codes, to be sure
    split: str = "test"  # split for the NELBO and the reference properties
    nelbo_samples: int = 2048  # sequences for the NELBO; 0: skip
    nelbo_draws: int = 4  # times per sequence
    t_min: float = 1e-4  # smallest time of the NELBO
    num: int = 1024  # samples; 0: skip sampling
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_size: int | None = None  # samples at once; null: 64 on each CPU core, 1024 on a GPU
    fcd: bool = False  # molecules: Frechet ChemNet distance
    moses: bool = False  # molecules: MOSES' metrics, against its published test sets
    scorer: str | None = None  # text: directory of a transformers causal model; null: n-gram model on held-out text
    mauve: bool = False  # text: MAUVE in the scorer's features
    inception: str | None = None  # images: file of Inception's weights, for FID; null: a classifier trained here
    # zero-shot perplexity: NAME: file or folder of text, or {path: ..., key: ..., unit: ..., detokenize: ...}
    texts: dict[str, Any] = field(default_factory=dict)
    out: str | None = None  # JSON file; null: beside the model, in evaluations/
    weights: str = "ema"
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        domains = ("auto", "molecules", "text", "responses", "genomes", "images", "codes")
        if self.domain not in domains:
            raise UserError(f"domain={self.domain!r} is not possible; it must be one of {', '.join(domains)}")
        for name, least in (("nelbo_samples", 0), ("nelbo_draws", 1), ("num", 0), ("batch_size", 1), ("threads", 0)):
            _require_least(self, name, least)
        require_seeds("seeds", self.seeds)
        if not 0 < self.t_min < 0.5:
            raise UserError(f"t_min={self.t_min} is not possible; it must be between 0 and 0.5")
        _check_place(self.weights, self.device, self.precision)
        self.zero_shot_texts()
        self.sampler.validate()

    def zero_shot_texts(self) -> dict[str, ZeroShotConfig]:
        """By name. Raises UserError for keys and values that are none."""
        found = {}
        for name, value in self.texts.items():
            keys = {"path": value} if isinstance(value, str) else value
            if not isinstance(keys, dict):
                raise UserError(
                    f"texts.{name}={value!r} is not possible; it must be a path, or {{path: ..., key: ...}}"
                )
            found[name] = read_config(ZeroShotConfig, keys, f"in texts.{name}")
        return found


def require_seeds(key: str, seeds: Sequence[int]) -> None:
    """UserError unless an interval over these seeds means something."""
    if not seeds or not all(0 <= seed <= 2**62 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(
            f"{key}={list(seeds)} is not possible; it must be a list of at least one seed between 0 and 2^62, each once"
        )


def _require_least(config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if value is not None and value < least:
        raise UserError(f"{name}={value} is not possible; it must be at least {least}")


def _check_place(weights: str, device: str, precision: str) -> None:
    for name, value, choices in (
        ("weights", weights, ("ema", "raw")),
        ("device", device, ("auto", "cpu", "cuda")),
        ("precision", precision, ("auto", "float32", "bfloat16")),
    ):
        if value not in choices:
            raise UserError(f"{name}={value!r} is not possible; it must be one of {', '.join(choices)}")
