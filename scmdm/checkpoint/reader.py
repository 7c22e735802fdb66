"""Find, verify and load checkpoints.

A checkpoint is a model directory (`scmdm.models.model_files`) that also holds the optimizer's tensors and `state.json`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from scmdm.checkpoint.model_verification import ALONE, Verification, first_problem
from scmdm.checkpoint.train_state import STATE_FILE, TrainState, trained_groups, with_prefixes
from scmdm.config.shipped import explain_missing
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import Engine
from scmdm.errors import UserError
from scmdm.models.model_files import MODEL_FILE, TENSORS, WEIGHTS_PREFIX
from scmdm.models.tensor_files import read_tensors
from scmdm.system.process_group import broadcast, current_world
from scmdm.system.run_directory import CHECKPOINTS, CONFIG_FILE, LATEST_FILE
from scmdm.system.untrusted import parse_as, read_json

logger = logging.getLogger("scmdm")
_NAME = re.compile(r"step_[0-9]{8,18}")
_NEEDED = (MODEL_FILE, STATE_FILE, CONFIG_FILE)
_LARGEST_STATE = 2**24  # bytes


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the number of steps in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints in `directory`, oldest first, without unfinished ones."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def newest_checkpoint(directory: Path, how: Verification = ALONE) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, None if there is none, and a problem of each newer one.

    All ranks call this together if `how.together` is set.
    """
    skipped: list[str] = []
    listed = list_checkpoints(directory)
    for path in reversed(broadcast(listed) if how.together else listed):
        problem = first_problem(path, how, needed=_NEEDED)
        if problem is None:
            return path, skipped
        skipped.append(f"skipped {path.name}: {problem}")
    return None, skipped


def read_state(checkpoint: Path) -> TrainState:
    """Read `state.json` of a checkpoint. Raises UserError when it is not as `snapshot` wrote it."""
    path = checkpoint / STATE_FILE
    return parse_as(TrainState, read_json(path, "state of a run", limit=_LARGEST_STATE), path)


def load_checkpoint(path: Path, engine: Engine, ema: Ema | None) -> TrainState:
    """Restore weights, optimizer and EMA in place from a verified checkpoint, and return the training state.

    The number of ranks, the mesh and the engine may differ from those that wrote it: each rank reads its own slices.
    """
    state = read_state(path)
    groups = trained_groups(engine, ema)
    packed = {prefix: engine.pack(group) for prefix, group in groups.items()}
    read_tensors(path / TENSORS, with_prefixes(packed) | with_prefixes({WEIGHTS_PREFIX: engine.frozen()}))
    for prefix, group in groups.items():
        engine.unpack(packed[prefix], group)
    engine.load_parameters(groups[WEIGHTS_PREFIX])
    engine.set_optimizer_step(state.step)
    if ema is not None:
        ema.update_number = state.ema_updates
    return state


def find_model(path: Path, how: Verification = ALONE) -> Path:
    """Return the model directory at `path`: `path` itself, or the newest undamaged checkpoint of a run.

    A run may be given as its directory, its folder of checkpoints, or `latest` in that folder. Raises UserError if
    there is none, or if `path` is a damaged model directory. All ranks call this together if `how.together` is set.
    """
    itself = (path / MODEL_FILE).is_file()
    if broadcast(itself) if how.together else itself:
        problem = first_problem(path, how)
        if problem is not None:
            raise UserError(f"{problem}; use another checkpoint (see `scmdm checkpoint list RUN`)")
        return path
    folder = checkpoints_of(path)
    checkpoint, skipped = newest_checkpoint(folder, how)
    for line in skipped if checkpoint is not None and (current_world().is_main or not how.together) else ():
        logger.warning("%s: %s", path, line)
    if checkpoint is None:
        require_existing(path)
        if (path / "config.json").is_file():
            raise UserError(f"{path} is a model in a published layout (config.json); first: scmdm import {path} NEW")
        found = f"holds no undamaged checkpoint ({skipped[0]})" if skipped else "is not a model and holds no checkpoint"
        raise UserError(f"{path} {found}; give a run directory, a checkpoint or an export")
    return checkpoint


def require_existing(path: Path) -> None:
    """Raise UserError, which lists similar names that are shipped, if there is nothing at `path`."""
    if not os.path.lexists(path):
        raise UserError(f"{explain_missing(path)}; give a run directory, a checkpoint or an exported model")


def checkpoints_of(path: Path) -> Path:
    """The folder of checkpoints at `path`: `path` itself, the one of a run, or the one that holds a file `latest`."""
    if path.name == LATEST_FILE and list_checkpoints(path.absolute().parent):
        return path.parent
    return path if list_checkpoints(path) else path / CHECKPOINTS
