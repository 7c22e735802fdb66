"""Log a run's progress: rows of `metrics.jsonl`, wandb, the progress bar, log lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from scmdm.diffusion.likelihood import Nelbo
from scmdm.models.experts.balance import load_summary
from scmdm.observability.progress_bar import StepDisplay
from scmdm.observability.run_metrics import (
    MetricsFile,
    Tracker,
    format_duration,
    logger,
    start_wandb,
)
from scmdm.observability.step_timer import LoggingWindow, StepTimer, peak_memory_gib, summarize_parts
from scmdm.system.run_directory import METRICS_FILE
from scmdm.system.terminal import Terminal
from scmdm.training.step import StepResult
from scmdm.training.training_run import TrainingRun


class MetricsLogger:
    """Logs steps and validations. All ranks call every method together; rank 0 writes."""

    def __init__(self, run: TrainingRun, console: Terminal) -> None:
        config, state, main = run.config, run.state, run.engine.rank == 0
        self._run, self._window = run, LoggingWindow()
        self.timer = StepTimer(run.engine.device, run.watchdog.beat)
        self._tracker: Tracker | None = None
        if main:
            run.fence.require()
            self._tracker = start_wandb(config.wandb, run.directory, asdict(config), state.wandb_id)
        if self._tracker is not None:
            state.wandb_id = self._tracker.id
        keep_going = config.train.on_save_error == "continue"
        path = run.directory / METRICS_FILE if main else None
        self._metrics = MetricsFile(path, state.step, keep_going=keep_going, fence=run.fence)
        self._display = StepDisplay(console, config.train.steps, state.step)

    def __enter__(self) -> MetricsLogger:
        self._display.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        self._run.watchdog.beat("end")
        self._display.__exit__(*reason)
        self._metrics.close()
        if self._run.fence.still_owned():  # else the new owner continues the tracker's run
            self._track(lambda tracker: tracker.finish())

    def count(self, result: StepResult, started: float) -> None:
        """Add a step, which began at `started` on `time.perf_counter`, to the run's totals and the progress bar."""
        state, seconds = self._run.state, time.perf_counter() - started
        state.step += 1
        self._run.watchdog.step_done(state.step)
        state.tokens += result.tokens
        state.evaluations += result.evaluations
        state.seconds += seconds
        state.loss_sum += result.loss
        state.loss_count += 1
        self._window.add(result.tokens)
        self._display.advance(result.loss, result.tokens / seconds)

    def paused(self) -> AbstractContextManager[None]:
        """Exclude the block from the training time."""
        return self._window.paused()

    def log_step(self, result: StepResult, lr: float) -> None:
        """Write a row for the steps since the last row."""
        run, window, state = self._run, self._window, self._run.state
        loss, train = state.loss_sum / state.loss_count, run.config.train
        state.loss_sum, state.loss_count = 0.0, 0
        seconds = window.seconds()
        speed = window.tokens / seconds
        row = {
            "kind": "train",
            "step": state.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": state.tokens,
            "evaluations": state.evaluations,
            "tokens_per_s": speed,
            "seconds": state.seconds,
            **summarize_parts(self.timer.read(), window.steps),
            **run.utilization.at(window.steps * train.global_batch_size / seconds),
            "peak_memory_gib": peak_memory_gib(run.engine.device),
            **({} if result.expert_tokens is None else load_summary(result.expert_tokens)),
        }
        self._write("train", row)
        self._window = LoggingWindow()
        left = format_duration((train.steps - state.step) * result.tokens / speed)
        logger.info(
            "step %d/%d loss %.4f lr %.2e %.0f tokens/s left %s", state.step, train.steps, loss, lr, speed, left
        )

    def log_validation(self, null: Nelbo, conditioned: Nelbo | None) -> None:
        """Write a row of both NELBOs; `conditioned` is None for a vanilla model."""
        run = self._run
        row = {
            "kind": "validation",
            "step": run.state.step,
            "nelbo_null": null.mean,
            "stderr_null": null.stderr,
            "nelbo_conditioned": conditioned.mean if conditioned else None,
            "stderr_conditioned": conditioned.stderr if conditioned else None,
            "weights": "ema" if run.ema is not None else "raw",
            "tokens": run.state.tokens,
        }
        self._write("validation", row)
        text = f"conditioned {conditioned.mean:.4f}" if conditioned else "vanilla"
        logger.info("step %d validation NELBO null %.4f +- %.4f %s", run.state.step, null.mean, null.stderr, text)

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        if self._run.engine.rank == 0:
            self._run.fence.require()
        self._metrics.write(row)
        numbers = {f"{kind}/{key}": value for key, value in row.items() if isinstance(value, int | float)}
        del numbers[f"{kind}/step"]
        self._track(lambda tracker: tracker.log(numbers, step=row["step"]))

    def _track(self, act: Callable[[Tracker], None]) -> None:
        """Call wandb, and continue without it on failure: SIGTERM to all processes of a job ends wandb's service."""
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:  # noqa: BLE001 - a dead service makes wandb raise errors of many classes
            self._tracker = None
            logger.warning(
                "wandb failed (%s: %s); metrics are only written to metrics.jsonl", type(error).__name__, error
            )
