"""One optimizer step: noise, two passes, accumulation, update.

Legend: B this rank's sequences of the step, L length, N sequences of the global batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scmdm.config.run import RunConfig
from scmdm.diffusion.causal_annealing import causally_annealed
from scmdm.diffusion.noise import keyed_int, keyed_normal
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import NoisedBatch, noise_batch, stratified_times
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import Sequences, drop_labels
from scmdm.distributed.base_estimate import EstimatedByBase
from scmdm.distributed.engine import Engine
from scmdm.errors import UserError
from scmdm.models.experts.balance import update_balance
from scmdm.models.experts.router import record_of
from scmdm.observability.step_timer import StepTimer, TimedDenoiser
from scmdm.training.exchange import GlobalBatch, Upcoming, exchange


@dataclass(frozen=True)
class StepResult:
    """Measurements of one optimizer step."""

    loss: float  # nats per valid token of the global batch, averaged as `train.loss_per` says
    grad_norm: float
    tokens: int  # valid tokens of the global batch
    evaluations: int  # denoiser evaluations times sequences, over the global batch
    signal: int = 0  # number of a signal that a rank has received; 0: none
    upcoming: GlobalBatch | None = None  # samples of the next step
    longest_after: int = 0  # tokens of the longest sample of the step after it, if ranks have exchanged it
    expert_tokens: Tensor | None = None  # (layers, experts): tokens of the global batch that went to each expert


def train_step(
    engine: Engine,
    config: RunConfig,
    schedule: Schedule,
    mask_id: int,
    sequences: Sequences,
    step: int,
    timer: StepTimer | None = None,
    *,
    everyone: GlobalBatch | None = None,
    read_next: Callable[[], Upcoming] = lambda: Upcoming(None),
    received: Callable[[], int | None] = lambda: None,
) -> StepResult:
    """Run one step on this rank's share of the global batch and update the weights.

    The loss is the sum over the global batch divided by its valid tokens; with `train.loss_per=sample` it is the mean
    over the samples of each one's sum divided by its valid tokens. All noise is keyed on the samples. Neither depends
    on the number of ranks or micro-batches. Raises UserError when the loss or the gradient is not finite; the weights
    are then unchanged. `timer` measures the parts of the step.

    After the backward pass all ranks meet in one collective besides the engine's (`scmdm.training.exchange`); a mixture
    of experts adds another, of its loads. `everyone` has the samples of this step, as the step before has returned them
    (`upcoming`); None: they are exchanged now. `read_next` reads this rank's part of the next steps' samples, and
    `received` a stop signal, if there is one.
    """
    timer = timer or StepTimer(engine.device)
    if everyone is None:
        everyone = exchange(engine, Upcoming(sequences)).upcoming
    assert everyone is not None
    tokens = everyone.valid_tokens.sum()
    divisor = (everyone.valid_tokens > 0).sum() if config.train.loss_per == "sample" else tokens
    t_N = stratified_times(config.seed, step, everyone.ids, config.diffusion.t_min)
    t_B = t_N[engine.data_rank * len(sequences) :][: len(sequences)]
    total, passes = _accumulate(engine, config, schedule, mask_id, sequences, t_B, step, divisor, tokens, timer)
    record = record_of(engine.model)
    with timer.part("data"):
        following = read_next()
    with timer.part("sync"):
        counts = None if record is None else record.take_counts()
        met = exchange(engine, following, total, received() or 0, counts)
    with timer.part("optimizer"):
        loss = met.loss / divisor
        grad_norm = engine.clip_grad_norm(config.optimizer.clip, ~loss.isfinite())
        engine.step(~(loss.isfinite() & grad_norm.isfinite()))
        evaluations = passes * len(sequences) * engine.data_size
        result = StepResult(
            float(loss),
            float(grad_norm),
            int(tokens),
            evaluations,
            int(met.signal),
            met.upcoming,
            int(met.longest_after),
            met.counts,
        )
    _require_finite(result, step)
    if result.expert_tokens is not None:
        update_balance(engine.model, result.expert_tokens, config.model.router_bias_rate)
    return result


def _accumulate(
    engine: Engine,
    config: RunConfig,
    schedule: Schedule,
    mask_id: int,
    sequences: Sequences,
    t_B: Tensor,
    step: int,
    divisor: Tensor,
    tokens: Tensor,
    timer: StepTimer,
) -> tuple[Tensor, int]:
    """Accumulate gradients over micro-batches; return the sum of this rank's loss, and the passes of a micro-batch."""
    opened = {"seed": config.seed, "step": step, "steps": config.train.causal_steps}
    own = engine.denoiser if engine.base is None else EstimatedByBase(engine.denoiser, engine.base)
    denoiser = causally_annealed(TimedDenoiser(own, timer), sequences.tokens, **opened)
    torch.manual_seed(keyed_int(config.seed, f"dropout/{engine.rank}", step))
    record = record_of(engine.model)
    conditioning = config.self_conditioning
    size, total, passes = config.train.micro_batch_size, torch.zeros((), device=engine.device), 0
    for start in range(0, len(sequences), size):
        rows = slice(start, start + size)
        batch = _noise(config, schedule, mask_id, sequences[rows], t_B[rows], step)
        with engine.compute(), record.recording() if record is not None else contextlib.nullcontext():
            output = self_conditioned_nelbo(
                denoiser,
                batch,
                schedule,
                condition=conditioning.rate > 0,
                passes=conditioning.passes,
                estimate_dropout=conditioning.estimate_dropout,
                stop_gradient=conditioning.stop_gradient,
                share_lower=config.shared_layers > 0,
            )
        routing_loss = None if record is None else record.take_loss()
        with timer.part("backward"):
            loss = output.loss / divisor
            if routing_loss is not None:  # a sum over positions, whatever `train.loss_per` is
                loss = loss + routing_loss / tokens
            engine.backward(loss, last=start + size >= len(sequences))
        total += output.loss.detach()
        passes = output.passes
    return total, passes


def _noise(
    config: RunConfig, schedule: Schedule, mask_id: int, sequences: Sequences, t_B: Tensor, step: int
) -> NoisedBatch:
    if sequences.labels is not None:
        rate, ids_B = config.train.label_dropout, sequences.ids
        labels_B = drop_labels(sequences.labels, ids_B, rate=rate, seed=config.seed, step=step)
        sequences = replace(sequences, labels=labels_B)
    share_B = None
    if config.train.loss_per == "sample":
        share_B = 1 / sequences.valid.sum(1).clamp(min=1).float()
    batch = noise_batch(
        sequences.cropped(),
        t_B,
        schedule=schedule,
        mask_id=mask_id,
        seed=config.seed,
        step=step,
        rate=config.self_conditioning.rate,
        rollout_steps=config.self_conditioning.rollout_steps,
        rollout_span=config.self_conditioning.rollout_span,
        block_length=config.diffusion.block_length,
        t_min=config.diffusion.t_min,
    )
    return replace(batch, share=share_B, perturbation=_perturbation(config, batch.x, sequences.ids, step))


def _perturbation(config: RunConfig, x_BL: Tensor, ids_B: Tensor, step: int) -> Tensor | None:
    """Draw the noise (B, L, D) of what is carried; None if it is not perturbed."""
    own, width = config.self_conditioning, config.model.width
    if own.perturbation == 0 or own.rate == 0:
        return None
    noise_BLD = keyed_normal(config.seed, "perturbation", step, ids_B, x_BL.shape[1] * width).view(*x_BL.shape, width)
    return own.perturbation * noise_BLD


def _require_finite(result: StepResult, step: int) -> None:
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return
    raise UserError(
        f"step {step}: loss {result.loss} with gradient norm {result.grad_norm} is not finite; nothing was updated; in "
        "another run_dir, lower optimizer.lr, set optimizer.clip or try precision=float32"
    )
