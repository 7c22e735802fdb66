"""Configuration of training: the loop, the optimizer, the learning rate, averaging, Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from scmdm.config.fields import key

PROFILED_STEPS = 3  # of a profiler trace


@dataclass
class OptimizerConfig:
    """The AdamW optimizer."""

    lr: float = key(3e-4, help="peak learning rate", at_least=0, at_most=10)
    conditioner_lr: float | None = key(
        None, help="peak learning rate of the conditioner; null: lr", at_least=0, at_most=10
    )
    beta1: float = key(0.9, help="decay of the first moment", at_least=0, at_most=0.99999)
    beta2: float = key(0.999, help="decay of the second moment", at_least=0, at_most=0.9999999)
    eps: float = key(1e-8, help="added to the root of the second moment", at_least=0, at_most=1)
    weight_decay: float = key(
        0.0, help="decay of weight matrices; never of norms, biases and embeddings", at_least=0, at_most=10
    )
    clip: float = key(1.0, help="maximum gradient norm; 0: no clipping", at_least=0, at_most=1e9)


@dataclass
class ScheduleConfig:
    """The learning rate over the steps of a run."""

    kind: str = key("constant", help="learning rate after the warm-up", choices=("constant", "cosine", "linear"))
    warmup_steps: int = key(0, help="steps of linear warm-up", at_least=0, at_most=2**31)
    initial_ratio: float | None = key(
        None,
        help="learning rate of the first step divided by the peak, which is reached in the step after the warm-up; 0: "
        "as in MDLM; null: (k + 1) / warmup_steps in step k, which reaches the peak in the last step of the warm-up",
        at_least=0,
        at_most=1,
    )
    steps: int | None = key(
        None,
        help="cosine, linear: step at which the decay ends; null: train.steps. A resume with another end must name it",
        at_least=1,
        at_most=2**40,
        on_resume=True,
    )
    final_ratio: float = key(0.0, help="cosine, linear: final learning rate divided by the peak", at_least=0, at_most=1)


@dataclass
class EmaConfig:
    """The exponential moving average of the weights."""

    decay: float = key(0.9999, help="decay of the average; 0: no averaging", at_least=0, at_most=0.9999999)
    warmup: bool = key(
        True, help="use min(decay, (1 + k) / (10 + k)) at update k, counted from 1 at the start of the run"
    )
    reset: bool = key(
        True, help="adapt: start a new average; false: continue that of the base, with its count of updates"
    )


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = key(MISSING, help="optimizer steps", at_least=1, at_most=2**40, on_resume=True)
    label_dropout: float = key(
        0.1,
        help="with model.labels: fraction of the samples whose label is hidden, for classifier-free guidance",
        at_least=0,
        at_most=1,
    )
    last_layers: int | None = key(
        None,
        help="adapt: train only the conditioner and this number of last blocks; null: train all weights",
        at_least=0,
        at_most=1024,
    )
    causal_steps: int = key(
        0,
        help="adapt an autoregressive base: number of steps over which its causal mask is opened, pair by pair "
        "(DiffuLLaMA); validation always sees everything; 0: opened at once",
        at_least=0,
        at_most=2**40,
    )
    global_batch_size: int = key(64, help="sequences per optimizer step, over all ranks", at_least=1, at_most=2**30)
    micro_batch_size: int = key(
        64, help="sequences per forward pass of a rank", at_least=1, at_most=2**30, on_resume=True
    )
    padding: str = key(
        "length",
        help="length of padded samples: that of the data; batch: of the longest of the global batch (LLaDA); sample: "
        "each its own, so that none sees more padding",
        choices=("length", "batch", "sample"),
    )
    pad_multiple: int = key(
        64, help="padding=batch, sample: lengths are rounded up to multiples of this", at_least=1, at_most=2**20
    )
    loss_per: str = key(
        "token",
        help="how the loss is averaged; token: over all tokens that count; sample: within each sample, then over "
        "samples, so that long answers weigh no more than short ones (LLaDA)",
        choices=("token", "sample"),
    )
    log_every: int = key(10, help="steps between log lines", at_least=1, at_most=2**31, on_resume=True)
    validate_every: int = key(
        500, help="steps between validations; 0: never", at_least=0, at_most=2**31, on_resume=True
    )
    validation_samples: int = key(
        1024,
        help="sequences per validation, spread evenly over the split",
        at_least=1,
        at_most=2**31,
        on_resume=True,
    )
    checkpoint_every: int = key(500, help="steps between checkpoints", at_least=1, at_most=2**31, on_resume=True)
    keep_last: int = key(2, help="number of newest checkpoints to keep", at_least=1, at_most=2**31, on_resume=True)
    keep_every: int = key(
        0,
        help="also keep the checkpoints at multiples of this number of steps; 0: none",
        at_least=0,
        at_most=2**31,
        on_resume=True,
    )
    keep_best: bool = key(False, help="also keep the checkpoint of the lowest validation NELBO", on_resume=True)
    async_checkpoint: bool = key(
        True, help="write checkpoints in the background, except for the last one", on_resume=True
    )
    profile_step: int = key(
        0,
        help="write a torch profiler trace of three steps, beginning with this one, into run_dir/profile; 0: none",
        at_least=0,
        at_most=2**40,
        on_resume=True,
    )
    watchdog_minutes: float = key(
        10.0,
        help="abort with the stacks of all ranks after this time without progress; 0: never",
        at_least=0,
        at_most=2**20,
        on_resume=True,
    )
    on_save_error: str = key(
        "stop",
        help="what to do when a checkpoint or a row of metrics cannot be written",
        choices=("stop", "continue"),
        on_resume=True,
    )


@dataclass
class WandbConfig:
    """Logging to Weights & Biases."""

    mode: str = key("disabled", help="where to log", choices=("disabled", "offline", "online"), on_resume=True)
    project: str = key("scmdm", help="name of the project", on_resume=True)
    name: str | None = key(None, help="name of the run; null: that of the run directory", on_resume=True)
