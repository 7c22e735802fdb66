"""Find, verify and load checkpoints.

A checkpoint is a model directory (`scmdm.models.model_files`) that also holds the optimizer's tensors and `state.json`.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from scmdm.checkpoint.seal import verify_checkpoint
from scmdm.checkpoint.train_state import STATE_FILE, TrainState, trained_groups, with_prefixes
from scmdm.config.shipped import explain_missing
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import Engine
from scmdm.errors import UserError
from scmdm.models.model_files import MODEL_FILE, TENSORS, WEIGHTS_PREFIX
from scmdm.models.tensor_files import read_tensors
from scmdm.system.run_directory import CHECKPOINTS

logger = logging.getLogger("scmdm")
_NAME = re.compile(r"step_\d{8,}")


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


def newest_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, None if there is none, and the problems of newer ones."""
    skipped: list[str] = []
    for path in reversed(list_checkpoints(directory)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, skipped
        skipped.append(f"skipped {path.name}: {'; '.join(problems)}")
    return None, skipped


def load_checkpoint(path: Path, engine: Engine, ema: Ema | None) -> TrainState:
    """Restore weights, optimizer and EMA in place from a verified checkpoint, and return the training state.

    The number of ranks, the mesh and the engine may differ from those that wrote it: each rank reads its own slices.
    """
    state = TrainState(**json.loads((path / STATE_FILE).read_text()))
    groups = trained_groups(engine, ema)
    packed = {prefix: engine.pack(group) for prefix, group in groups.items()}
    read_tensors(path / TENSORS, with_prefixes(packed) | with_prefixes({WEIGHTS_PREFIX: engine.frozen()}))
    for prefix, group in groups.items():
        engine.unpack(packed[prefix], group)
    engine.load_parameters(groups[WEIGHTS_PREFIX])
    engine.set_optimizer_step(state.step)
    if ema is not None:
        ema.updates = state.ema_updates
    return state


def find_model(path: Path) -> Path:
    """Return the model directory at `path`: `path` itself, or the newest undamaged checkpoint of a run.

    Raises UserError if there is none, or if `path` is a damaged model directory.
    """
    if (path / MODEL_FILE).is_file():
        problems = verify_checkpoint(path)
        if problems:
            raise UserError(f"{problems[0]}; use another checkpoint (see `scmdm checkpoint list RUN`)")
        return path
    if not path.is_dir():
        raise UserError(f"{explain_missing(path)}; give a run directory, a checkpoint or an exported model")
    checkpoint, skipped = newest_checkpoint(path / CHECKPOINTS)
    for line in skipped if checkpoint is not None else ():
        logger.warning("%s: %s", path, line)
    if checkpoint is None:
        reason = f" ({skipped[0]})" if skipped else ""
        raise UserError(
            f"{path} holds no undamaged checkpoint{reason}; give a run directory, a checkpoint or an export"
        )
    return checkpoint
