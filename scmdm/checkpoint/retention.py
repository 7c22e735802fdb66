"""Removal of checkpoints that are no longer kept, and of unfinished ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from scmdm.checkpoint.reader import list_checkpoints, step_of
from scmdm.config.training import TrainConfig


def remove_old_checkpoints(directory: Path, newest: Path, config: TrainConfig, best_step: int | None) -> None:
    """Remove all checkpoints except those that the configuration keeps.

    It keeps the last `train.keep_last` up to `newest`, one every `train.keep_every` steps, and with `train.keep_best`
    that of `best_step`. Checkpoints after `newest` are removed: the run resumed before them because they were damaged.
    """
    found = list_checkpoints(directory)
    position = found.index(newest)
    kept = set(found[: position + 1][-config.keep_last :])
    for path in found[:position]:
        step = step_of(path)
        if (config.keep_every and step % config.keep_every == 0) or (config.keep_best and step == best_step):
            kept.add(path)
    for path in found:
        if path in kept:
            continue
        # Rename first, so that a checkpoint under its own name is always complete.
        renamed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(renamed, ignore_errors=True)
        os.rename(path, renamed)
        shutil.rmtree(renamed)


def remove_leftovers(directory: Path) -> None:
    """Remove unfinished checkpoints of a process that died. Only the holder of the run's lease may call this."""
    for path in [*directory.glob(".step_*.tmp"), *directory.glob(".step_*.old"), *directory.glob(".step_*.removed")]:
        shutil.rmtree(path, ignore_errors=True)
