"""Removal of checkpoints that are no longer kept, and of unfinished ones."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from scmdm.checkpoint.reader import list_checkpoints, step_of
from scmdm.config.training import TrainConfig
from scmdm.system.files import remove_tree
from scmdm.system.run_directory import CHECKPOINTS, CONFIG_FILE, ENVIRONMENT_FILE, LATEST_FILE, METRICS_FILE

logger = logging.getLogger("scmdm")


def remove_old_checkpoints(
    directory: Path,
    newest: Path,
    config: TrainConfig,
    best_step: int | None,
    damaged: Collection[str] = (),
    *,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Remove all checkpoints except those that the configuration keeps.

    It keeps the last `train.keep_last` up to `newest`, one every `train.keep_every` steps, and with `train.keep_best`
    that of `best_step`. Checkpoints after `newest` are removed, and those whose names are in `damaged`: the run resumed
    before them because they were damaged. `before` is called before each removal, and may raise.
    """
    found = list_checkpoints(directory)
    earlier = [path for path in found[: found.index(newest)] if path.name not in damaged]
    kept = {*[*earlier, newest][-config.keep_last :]}
    for path in earlier:
        step = step_of(path)
        if (config.keep_every and step % config.keep_every == 0) or (config.keep_best and step == best_step):
            kept.add(path)
    for path in found:
        if path in kept:
            continue
        before()
        try:
            _retire(path)
        except OSError as error:  # the new checkpoint is complete all the same
            logger.warning("%s cannot be removed (%s); remove it by hand", path, error.strerror or error)


def _retire(path: Path) -> None:
    """Remove a checkpoint. Of one that was moved elsewhere and linked back, only the link is removed."""
    if path.is_symlink():
        logger.info("%s is no longer kept; its link was removed, %s was not", path, os.readlink(path))
        path.unlink()
        return
    # Rename first, so that a checkpoint under its own name is always complete.
    renamed = path.with_name(f".{path.name}.removed")
    remove_tree(renamed)
    os.rename(path, renamed)
    remove_tree(renamed)


def remove_leftovers(run: Path) -> None:
    """Remove unfinished checkpoints and files of a process that died. Only the holder of the run's lease may call this.

    Other commands may write into the run directory at the same time, so only names that a run writes are removed.
    """
    patterns = [f"{CHECKPOINTS}/.step_*.{end}" for end in ("tmp", "old", "removed")]
    patterns += [f"{CHECKPOINTS}/.{LATEST_FILE}.*.tmp"]
    patterns += [f".{name}.*.tmp" for name in (CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE)]
    for path in [path for pattern in patterns for path in run.glob(pattern)]:
        with contextlib.suppress(OSError):
            remove_tree(path)
