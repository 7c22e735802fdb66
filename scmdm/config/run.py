"""Configuration of a training run: all keys of `scmdm train` and `scmdm adapt`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar

from omegaconf import MISSING

from scmdm.config.common import device_key, precision_key, seed_key, threads_key, verify_key
from scmdm.config.data import DataConfig
from scmdm.config.diffusion import DiffusionConfig, SelfConditioningConfig
from scmdm.config.distributed import DeepspeedConfig, FsdpConfig
from scmdm.config.fields import PathKind, key, require
from scmdm.config.model import DENOISERS, ModelConfig, default_model
from scmdm.config.presets import PRESETS, Preset
from scmdm.config.training import (
    PROFILED_STEPS,
    EmaConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    WandbConfig,
)
from scmdm.errors import UserError


@dataclass
class RunConfig:
    """A training run, from scratch or from a base model."""

    removed_keys: ClassVar[dict[str, str]] = {
        "model.llama": "write its keys in `model`, as in model.kv_heads, with model.kind=decoder",
        "self_conditioning.estimate_from": "leave it out; rollout_steps=1 makes the estimate from a noisier state",
        "model.estimate_rank": "leave it out; the top-k estimate needs no preview",
    }

    # Values of removed keys that are what a run does without them: runs that have stored them are resumed.
    removed_defaults: ClassVar[dict[str, object]] = {"self_conditioning.estimate_from": "same_state"}

    presets: ClassVar[dict[str, dict[str, Preset]]] = {"self_conditioning.preset": PRESETS}

    run_dir: str = key(MISSING, path=PathKind.OUTPUT, help="directory of checkpoints, metrics and logs", on_resume=True)
    base: str | None = key(
        None, path=PathKind.INPUT, help="adapt: run, checkpoint or exported model to start from", on_resume=True
    )
    verify: str = verify_key(on_resume=True)
    any_length: bool = key(False, help="adapt: allow samples of another length than the base's")
    seed: int = seed_key()
    device: str = device_key(on_resume=True)
    precision: str = precision_key()
    engine: str = key(
        "auto",
        help="distributed engine; auto: fsdp2 under torchrun, else single",
        choices=("auto", "single", "fsdp2", "deepspeed"),
        on_resume=True,
    )
    threads: int = threads_key(on_resume=True)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = key(
        factory=default_model, registry=DENOISERS, selector="kind", help="architecture of the denoiser"
    )
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
        """Raise UserError for a combination of keys that cannot work. Single values are checked on loading."""
        self.data.validate()
        self._validate_model()
        self._validate_training()
        self._validate_self_conditioning()
        self._validate_effects()
        self.check_preset()
        if self.engine == "deepspeed":
            self._validate_deepspeed()

    def check_command(self, command: str) -> None:
        """Raise UserError when `adapt` has no base, or `train` has keys that only `adapt` reads."""
        if command == "train" and self.base is not None:
            raise UserError(f"base={self.base} is for `scmdm adapt`; `scmdm train` starts from scratch: leave base out")
        if command == "adapt" and self.base is None:
            raise UserError("key `base` is not set; give a run, a checkpoint or an export to adapt as base=PATH")
        if command == "train" and self.self_conditioning.carried_from == "base":
            raise UserError("self_conditioning.carried_from=base is for `scmdm adapt`, which has a base; set it to own")
        if command == "train" and self.any_length:
            raise UserError("any_length=true is for `scmdm adapt`, whose base has a length: leave it out")
        if command == "train" and not self.ema.reset:
            raise UserError("ema.reset=false is for `scmdm adapt`; without a base there is no average: leave it out")
        if command == "train" and self.train.causal_steps:
            raise UserError(
                f"train.causal_steps={self.train.causal_steps} is for `scmdm adapt`, from an autoregressive base; "
                "leave it out"
            )
        if command == "train" and self.trained_layers is not None:
            name = self._partial_key
            raise UserError(f"{name}={attrgetter(name)(self)} is for `scmdm adapt`; leave it out")

    @property
    def trained_layers(self) -> int | None:
        """Number of the base's blocks that are trained while the rest is frozen; None: everything is trained."""
        return 0 if self.model.lora_rank else self.train.last_layers

    @property
    def shared_layers(self) -> int:
        """Number of first blocks that run once for both passes: the passes see the same state, with equal dropout."""
        own = self.self_conditioning
        equal = not own.rollout_steps and (own.estimate_dropout or not self.model.dropout)
        equal = equal and own.carried_from == "own"
        return self.model.inject_layer if own.rate > 0 and equal else 0

    @property
    def estimate_passes(self) -> int:
        """Number of passes per step that compute the estimate."""
        own = self.self_conditioning
        return (own.rollout_steps or own.passes) if own.rate > 0 else 0

    @property
    def copies_base(self) -> bool:
        """Whether a run keeps a frozen copy of its base, which makes the estimate."""
        own = self.self_conditioning
        return own.rate > 0 and own.carried_from == "base" and not self.model.lora_rank

    @property
    def _partial_key(self) -> str:
        """Key that restricts training to a part of the weights."""
        return "model.lora_rank" if self.model.lora_rank else "train.last_layers"

    def engine_on(self, size: int) -> str:
        """Return the engine that `size` ranks use, which replaces `auto`."""
        return self.engine if self.engine != "auto" else "single" if size == 1 else "fsdp2"

    def check_ranks(self, size: int) -> None:
        """Raise UserError when `size` ranks cannot share the batch or form the device mesh."""
        if self.engine == "single" and size > 1:
            raise UserError(
                f"engine=single is not possible with {size} processes; use engine=auto, or start one process"
            )
        for name in ("offload", "reshard_after_estimate"):
            wanted = f"false with engine={self.engine} and one process; or set engine=fsdp2"
            value = getattr(self.fsdp, name)
            require(self.engine_on(size) != "single" or not value, f"fsdp.{name}", value, wanted)
        for name in ("replicate", "context"):
            value = getattr(self.fsdp, name)
            require(size % value == 0, f"fsdp.{name}", value, f"a divisor of the number of processes = {size}")
        shards, own = size // self.fsdp.replicate, self.fsdp.experts
        require(shards % own == 0, "fsdp.experts", own, f"a divisor of processes / fsdp.replicate = {shards}")
        train, parts = self.train, size // self.fsdp.context
        if train.global_batch_size % (parts * train.micro_batch_size):
            raise UserError(
                f"train.global_batch_size={train.global_batch_size} is not possible with {size} processes; it must "
                f"be a multiple of {parts} x train.micro_batch_size = {parts * train.micro_batch_size}"
            )

    @property
    def unused_keys(self) -> dict[str, str]:
        """Keys that have no effect with the values of others, and which values these are."""
        train, schedule, zero, noise = self.train, self.schedule, self.deepspeed, self.diffusion.schedule
        from_scratch = self.base is None  # an adaptation may repeat keys of its base
        scaling = getattr(self.model, "rotary_scaling", None) if from_scratch else None
        scaled = f"model.rotary_scaling={scaling}"
        constant = "schedule.kind=constant, which has no decay"
        table = (
            (schedule.kind == "constant", "schedule.steps", constant),
            (schedule.kind == "constant", "schedule.final_ratio", constant),
            (schedule.warmup_steps == 0, "schedule.initial_ratio", "schedule.warmup_steps=0"),
            (from_scratch and noise != "polynomial", "diffusion.power", f"diffusion.schedule={noise}"),
            (from_scratch and noise == "polynomial", "diffusion.eps", f"diffusion.schedule={noise}"),
            (scaling in ("none", "linear", "dynamic"), "model.rotary_slow_turns", scaled),
            (scaling in ("none", "linear", "dynamic"), "model.rotary_fast_turns", scaled),
            (scaling in ("none", "linear"), "model.rotary_length", scaled),
            (scaling in ("none", "linear", "dynamic", "llama3"), "model.rotary_truncate", scaled),
            (
                from_scratch and self.model.experts > 0 and not self.model.router_bias,
                "model.router_bias_rate",
                "model.router_bias=false",
            ),
            (self.model.lora_rank == 0, "model.lora_alpha", "model.lora_rank=0"),
            (self.model.lora_rank == 0, "model.lora_targets", "model.lora_rank=0"),
            (
                self.self_conditioning.rollout_steps == 0,
                "self_conditioning.rollout_span",
                "self_conditioning.rollout_steps=0",
            ),
            (train.padding == "length", "train.pad_multiple", "train.padding=length"),
            (train.validate_every == 0, "train.keep_best", "train.validate_every=0"),
            (self.engine != "deepspeed", "deepspeed.stage", f"engine={self.engine}; it is for engine=deepspeed"),
            (zero.stage < 3, "deepspeed.param_persistence_threshold", f"deepspeed.stage={zero.stage}; it is for 3"),
        )
        return {name: reason for unused, name, reason in table if unused}

    def _validate_effects(self) -> None:
        """Raise UserError for a key that is set and has no effect with the others."""
        train = self.train
        for name, reason in self.unused_keys.items():
            section, _, last = name.partition(".")
            value, default = attrgetter(name)(self), getattr(type(attrgetter(section)(self))(), last)
            require(value == default, name, value, f"left out with {reason}")
        last_trace = max(0, train.steps - PROFILED_STEPS + 1)
        wanted = f"at most {last_trace} with train.steps={train.steps}: a trace has {PROFILED_STEPS} steps"
        require(train.profile_step <= last_trace, "train.profile_step", train.profile_step, wanted)
        common = math.lcm(train.validate_every, train.checkpoint_every)
        require(
            not train.keep_best or train.validate_every >= train.steps or common <= train.steps,
            "train.keep_best",
            train.keep_best,
            f"false with train.validate_every={train.validate_every} and train.checkpoint_every="
            f"{train.checkpoint_every}, which no step before the last has in common",
        )

    def _validate_model(self) -> None:
        model = self.model
        model.validate()
        require(
            self.device != "cpu" or model.attention in ("auto", "sdpa"),
            "model.attention",
            model.attention,
            "auto or sdpa with device=cpu: the other kernels need a GPU",
        )

    def _validate_training(self) -> None:
        train = self.train
        require(
            train.global_batch_size % train.micro_batch_size == 0,
            "train.micro_batch_size",
            train.micro_batch_size,
            f"a divisor of train.global_batch_size = {train.global_batch_size}",
        )
        self._validate_schedule()
        require(
            not train.causal_steps or self.fsdp.context == 1,
            "train.causal_steps",
            train.causal_steps,
            "0 with fsdp.context above 1",
        )
        require(
            self.ema.reset or (self.ema.warmup and self.ema.decay > 0),
            "ema.reset",
            self.ema.reset,
            "true without averages or ema.warmup: only the warm-up uses the base's number of updates",
        )
        require(
            train.last_layers is None or not self.model.lora_rank,
            "train.last_layers",
            train.last_layers,
            "null with model.lora_rank: only the adapters are trained",
        )

    def _validate_self_conditioning(self) -> None:
        own = self.self_conditioning
        wanted: dict[str, object] = {}
        if own.rollout_steps:
            wanted = {"passes": 1}
            reason = f"self_conditioning.rollout_steps={own.rollout_steps}, which has passes of its own"
        if own.carried_from == "base":
            wanted = {"passes": 1, "rollout_steps": 0, "stop_gradient": True}
            reason = "self_conditioning.carried_from=base, whose weights are frozen and see no estimate"
        for name, value in wanted.items():
            found = getattr(own, name)
            require(found == value, f"self_conditioning.{name}", found, f"{str(value).lower()} with {reason}")

    def check_preset(self) -> None:
        """Raise UserError when a key contradicts the definition of the preset."""
        name = self.self_conditioning.preset
        for part, value in PRESETS[name].defining.items() if name is not None else ():
            found = attrgetter(part)(self)
            require(found == value, part, found, f"{value} with self_conditioning.preset={name}")

    def _validate_schedule(self) -> None:
        schedule, steps = self.schedule, self.train.steps
        warmup, end = schedule.warmup_steps, schedule.steps
        require(warmup <= steps, "schedule.warmup_steps", warmup, f"at most train.steps = {steps}")
        require(end is None or end >= warmup, "schedule.steps", end, f"at least schedule.warmup_steps = {warmup}")

    def _validate_deepspeed(self) -> None:
        for name, default in vars(FsdpConfig()).items():
            value = getattr(self.fsdp, name)
            require(value == default, f"fsdp.{name}", value, "left out with engine=deepspeed; it is for engine=fsdp2")
        require(
            self.trained_layers is None,
            self._partial_key,
            attrgetter(self._partial_key)(self),
            "left out with engine=deepspeed, which cannot freeze weights; use engine=fsdp2",
        )
        require(
            self.self_conditioning.carried_from == "own",
            "self_conditioning.carried_from",
            self.self_conditioning.carried_from,
            "own with engine=deepspeed, which would keep a whole copy of the base on each rank; use engine=fsdp2",
        )
        require(
            self.model.compile == "none" or self.deepspeed.stage < 3,
            "model.compile",
            self.model.compile,
            "none with deepspeed.stage=3, whose hooks cannot be compiled; use stage 1 or 2, or engine=fsdp2",
        )
        require(
            self.model.matmul_precision == "compute",
            "model.matmul_precision",
            self.model.matmul_precision,
            "compute with engine=deepspeed, whose autocast casts what linear maps multiply; use engine=fsdp2",
        )
