"""The configuration of a run: every key that `scmdm train` and `scmdm adapt` know, with its default.

Comments behind a key are what `--help` shows for it. `validate` refuses combinations that cannot work, before any work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from scmdm.config.dataset_config import DataConfig
from scmdm.config.model import ModelConfig
from scmdm.errors import UserError

CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "float32", "bfloat16"),
    "engine": ("auto", "single", "fsdp2", "deepspeed"),
    "model.kind": ("dit", "llama"),
    "model.attention": ("auto", "sdpa", "cudnn", "flash", "varlen"),
    "model.conditioner": ("projection", "norm", "mlp"),
    "model.inject_at": ("all", "masked"),
    "model.head_precision": ("float32", "compute"),
    "model.activation_checkpointing": ("none", "selective", "full"),
    "diffusion.schedule": ("log_linear", "cosine", "polynomial"),
    "self_conditioning.estimate_from": ("same_state", "noisier_state"),
    "schedule.kind": ("constant", "cosine", "linear"),
    "train.on_save_error": ("stop", "continue"),
    "wandb.mode": ("disabled", "offline", "online"),
}


@dataclass
class DiffusionConfig:
    schedule: str = "log_linear"  # log_linear | cosine | polynomial
    eps: float = 0.0  # log_linear: alpha_t = 1 - (1 - eps) t; 1e-3 is MDLM's
    power: float = 2.0  # polynomial: alpha_t = 1 - t^power
    t_min: float = 1e-3  # smallest training time: bounds the loss weight


@dataclass
class SelfConditioningConfig:
    rate: float = 0.0  # probability that pass 2 is conditioned: 0 vanilla, 0.5 partial, 1 SCMDM
    estimate_from: str = "same_state"  # same_state | noisier_state
    passes: int = 1  # passes that make the estimate
    estimate_dropout: bool = True  # dropout in the passes that make the estimate, as in the one that carries the loss
    stop_gradient: bool = True  # false: the gradient also flows through the passes that make the estimate


@dataclass
class OptimizerConfig:
    lr: float = 3e-4
    conditioner_lr: float | None = None  # own peak rate of the conditioner; null: the same as lr
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices; never on norms, biases, embeddings
    clip: float = 1.0  # largest gradient norm; 0: no clipping


@dataclass
class ScheduleConfig:
    kind: str = "constant"  # constant | cosine | linear, after the warm-up
    warmup_steps: int = 0
    final_ratio: float = 0.0  # last rate over peak rate (cosine, linear)


@dataclass
class EmaConfig:
    decay: float = 0.9999  # 0: no averaging
    warmup: bool = True  # decay_k = min(decay, (1 + k) / (10 + k)), k counted from the start of this run
    reset: bool = True  # false: an adaptation goes on with its base's average, k counted from the start of the base


@dataclass
class TrainConfig:
    steps: int = MISSING  # optimizer steps
    label_dropout: float = 0.1  # of model.labels: part of the samples whose label is not shown, for guidance
    last_layers: int | None = None  # adapt: train the last so many blocks and the conditioner alone; null: everything
    global_batch_size: int = 64  # sequences per optimizer step, over all ranks
    micro_batch_size: int = 64  # sequences at once on a rank
    log_every: int = 10
    validate_every: int = 500  # 0: never
    validation_samples: int = 1024  # spread evenly over the validation split
    checkpoint_every: int = 500
    keep_last: int = 2  # checkpoints kept
    keep_every: int = 0  # keep those of every so many steps, too (0: none)
    keep_best: bool = False  # keep that of the lowest validation NELBO, too
    async_checkpoint: bool = True  # write checkpoints beside the training; the last one is waited for
    profile_step: int = 0  # write a torch profiler trace of three steps from this one on into run_dir/profile (0: none)
    watchdog_minutes: float = 10.0  # end with the stacks of all ranks after so long without a sign of life (0: never)
    on_save_error: str = "stop"  # stop | continue, with the checkpoints saved before


@dataclass
class FsdpConfig:
    """Of engine=fsdp2."""

    replicate: int = 1  # HSDP: so many groups of ranks hold a whole copy each, which is sharded within the group
    reshard_after_estimate: bool = False  # free the gathered weights between the two passes: less memory, more traffic
    offload: bool = False  # weights, gradients, averages and moments in host memory, where the update runs, too
    context: int = 1  # so many ranks share each sequence; it must divide data length and model.heads


@dataclass
class DeepspeedConfig:
    """Of engine=deepspeed."""

    stage: int = 2  # of ZeRO. 1: shards the optimizer's state | 2: gradients, too | 3: weights, too
    whole_below: int = 100_000  # stage 3: parameters with fewer elements stay whole on every rank


@dataclass
class WandbConfig:
    mode: str = "disabled"  # disabled | offline | online
    project: str = "scmdm"
    name: str | None = None  # null: the run directory's name


@dataclass
class RunConfig:
    """One training run."""

    run_dir: str = MISSING  # where checkpoints, metrics and logs go
    base: str | None = None  # adapt: run, checkpoint or exported model to start from
    any_length: bool = False  # adapt a base also to samples of another length than its own
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | float32 | bfloat16; auto: bfloat16 where the hardware has it
    engine: str = "auto"  # auto (fsdp2 under torchrun, else single) | single | fsdp2 | deepspeed
    threads: int = 0  # CPU threads; 0: all cores
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    self_conditioning: SelfConditioningConfig = field(default_factory=SelfConditioningConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def validate(self) -> None:
        """Raise UserError for a value or a combination that cannot work."""
        for key, choices in CHOICES.items():
            _require(_get(self, key) in choices, key, _get(self, key), f"one of {', '.join(choices)}")
        for key, low, high in _RANGES:
            value: Any = _get(self, key)
            if value is None:
                continue  # of optional keys null is possible: "as another key says"
            _require(low <= value <= high, key, value, f"between {low} and {high}")
        self.data.validate()
        self._validate_combinations()

    def check_command(self, command: str) -> None:
        """UserError when `adapt` lacks a base, or `train` is given one."""
        if command == "train" and self.base is not None:
            raise UserError(f"base={self.base} is for `scmdm adapt`; `scmdm train` starts from scratch: leave base out")
        if command == "adapt" and self.base is None:
            raise UserError("base is not set; give the model to adapt as base=RUN, a checkpoint or an export")
        if command == "train" and not self.ema.reset:
            raise UserError("ema.reset=false is for `scmdm adapt`; without a base there is no average: leave it out")
        if command == "train" and self.trained_layers is not None:
            raise UserError("train.last_layers and model.lora_rank are for `scmdm adapt`: leave them out")

    @property
    def trained_layers(self) -> int | None:
        """Blocks of the base that are trained when some of its weights stay as they are; None: all is trained."""
        return 0 if self.model.lora_rank else self.train.last_layers

    def check_ranks(self, size: int) -> None:
        """UserError for a batch or a mesh that `size` processes cannot share."""
        if self.engine == "single" and size > 1:
            raise UserError(f"engine=single, but there are {size} processes; use engine=auto, or start one process")
        for key, value in (("replicate", self.fsdp.replicate), ("context", self.fsdp.context)):
            if size % value:
                raise UserError(f"fsdp.{key}={value} is not possible; it must divide the {size} processes")
        train, parts = self.train, size // self.fsdp.context
        if train.global_batch_size % (parts * train.micro_batch_size):
            raise UserError(
                f"train.global_batch_size={train.global_batch_size} is not possible with {size} processes; it must "
                f"be a multiple of {parts} x train.micro_batch_size = {parts * train.micro_batch_size}"
            )

    def _validate_combinations(self) -> None:
        model, train = self.model, self.train
        even = model.width % (2 * model.heads) == 0
        _require(even, "model.width", model.width, f"a multiple of 2 x model.heads = {2 * model.heads} (rotary pairs)")
        self._validate_kind()
        rank = model.estimate_rank
        _require(
            rank is None or model.estimate_top_k is not None,
            "model.estimate_rank",
            rank,
            "set with model.estimate_top_k",
        )
        divides = train.global_batch_size % train.micro_batch_size == 0
        _require(
            divides,
            "train.micro_batch_size",
            train.micro_batch_size,
            f"a divisor of train.global_batch_size = {train.global_batch_size}",
        )
        warmup, steps = self.schedule.warmup_steps, train.steps
        _require(warmup <= steps, "schedule.warmup_steps", warmup, f"at most train.steps = {steps}")
        runs = self.device != "cpu" or model.attention in ("auto", "sdpa")
        _require(runs, "model.attention", model.attention, "auto or sdpa when device=cpu: it needs a GPU")
        selective = model.compile and model.activation_checkpointing == "selective"
        reason = "none or full with model.compile=true: inside a compiled block products cannot be told apart"
        _require(not selective, "model.activation_checkpointing", "selective", reason)
        counted = self.ema.reset or (self.ema.warmup and self.ema.decay > 0)
        _require(counted, "ema.reset", False, "true without ema.warmup or averages: nothing else depends on it")
        both = train.last_layers is not None and model.lora_rank > 0
        _require(
            not both, "train.last_layers", train.last_layers, "left out with model.lora_rank: adapters are trained"
        )
        if self.engine == "deepspeed":
            self._validate_deepspeed()

    def _validate_kind(self) -> None:
        """A key that the model's kind does not read is a mistake."""
        model, default = self.model, ModelConfig()
        others = {"dit": [f"llama.{key}" for key in vars(default.llama)]}
        unread = others.get(model.kind, ["condition_width", "time_conditioning", "labels"])
        for key in unread:
            value = _get(model, key)
            _require(value == _get(default, key), f"model.{key}", value, f"left out with model.kind={model.kind}")
        shared = self.model.llama.kv_heads or model.heads
        divides = model.heads % shared == 0
        _require(divides, "model.llama.kv_heads", shared, f"a divisor of model.heads = {model.heads}")

    def _validate_deepspeed(self) -> None:
        for key, default in vars(FsdpConfig()).items():
            value = getattr(self.fsdp, key)
            _require(value == default, f"fsdp.{key}", value, "left out with engine=deepspeed; it is for engine=fsdp2")
        key = "model.lora_rank" if self.model.lora_rank else "train.last_layers"
        reason = "left out with engine=deepspeed, whose flat groups hold trained weights alone; use engine=fsdp2"
        _require(self.trained_layers is None, key, _get(self, key), reason)
        reason = "false with deepspeed.stage=3, whose hooks cannot be compiled; use stage 1 or 2, or engine=fsdp2"
        _require(not (self.model.compile and self.deepspeed.stage == 3), "model.compile", True, reason)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**62),
    ("threads", 0, 1024),
    ("data.num_canonical_nodes", 1, 65536),
    ("data.num_workers", 0, 1024),
    ("model.width", 2, 65536),
    ("model.layers", 1, 1024),
    ("model.heads", 1, 1024),
    ("model.condition_width", 1, 65536),
    ("model.mlp_ratio", 1, 64),
    ("model.llama.kv_heads", 1, 1024),
    ("model.llama.mlp_width", 1, 2**20),
    ("model.llama.rotary_base", 1, 1e12),
    ("model.llama.norm_eps", 0, 1),
    ("model.dropout", 0, 0.99),
    ("model.head_chunk", 1, 2**31),
    ("model.estimate_top_k", 1, 2**31),
    ("model.estimate_rank", 1, 65536),
    ("model.lora_rank", 0, 65536),
    ("model.lora_alpha", 1e-9, 1e9),
    ("diffusion.eps", 0, 0.5),
    ("diffusion.power", 0.1, 16),
    ("diffusion.t_min", 1e-9, 0.5),
    ("self_conditioning.rate", 0, 1),
    ("self_conditioning.passes", 1, 64),
    ("optimizer.lr", 0, 10),
    ("optimizer.conditioner_lr", 0, 10),
    ("optimizer.beta1", 0, 0.99999),
    ("optimizer.beta2", 0, 0.9999999),
    ("optimizer.eps", 0, 1),
    ("optimizer.weight_decay", 0, 10),
    ("optimizer.clip", 0, 1e9),
    ("schedule.warmup_steps", 0, 2**31),
    ("schedule.final_ratio", 0, 1),
    ("ema.decay", 0, 0.9999999),
    ("fsdp.replicate", 1, 2**20),
    ("fsdp.context", 1, 65536),
    ("deepspeed.stage", 1, 3),
    ("deepspeed.whole_below", 0, 2**31),
    ("train.steps", 1, 2**40),
    ("train.label_dropout", 0, 1),
    ("train.last_layers", 0, 1024),
    ("train.global_batch_size", 1, 2**30),
    ("train.micro_batch_size", 1, 2**30),
    ("train.log_every", 1, 2**31),
    ("train.validate_every", 0, 2**31),
    ("train.validation_samples", 1, 2**31),
    ("train.checkpoint_every", 1, 2**31),
    ("train.keep_last", 1, 2**31),
    ("train.keep_every", 0, 2**31),
    ("train.profile_step", 0, 2**40),
    ("train.watchdog_minutes", 0, 2**20),
)


def _get(config: object, dotted: str) -> object:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{key}={value!r} is not possible; it must be {allowed}")
