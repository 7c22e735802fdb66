"""Checkpoints that are complete or absent, verified by hash, with the newest good one found by itself.

A checkpoint is a model directory (`scmdm.models.model_files`) plus the optimizer and `state.json`; `checkpoint.json`,
written last, lists every file with size and SHA-256. How one is made: `scmdm.checkpoint.writer`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import Engine
from scmdm.errors import UserError
from scmdm.models.model_files import EMA_PREFIX, MODEL_FILE, TENSORS, WEIGHTS_PREFIX
from scmdm.models.tensor_files import read_tensors
from scmdm.system.files import atomic_write_text, sha256_file

logger = logging.getLogger("scmdm")
SEAL, STATE_FILE, POINTER = "checkpoint.json", "state.json", "latest"
_NAME = re.compile(r"step_\d{8,}")


@dataclass
class TrainState:
    """What a run must remember besides tensors, to go on as if it had never stopped."""

    step: int = 0
    tokens: int = 0  # valid tokens trained on
    seconds: float = 0.0  # spent training, over all restarts
    evaluations: int = 0  # denoiser evaluations times sequences
    loss_sum: float = 0.0  # of the steps since the last logged one
    loss_count: int = 0
    ema_updates: int = 0
    loader: dict[str, Any] | None = None
    data_fingerprint: str = ""
    base_sha256: str | None = None  # of the weights that an adaptation started from
    wandb_id: str | None = None
    best_nelbo: float | None = None  # of the validations at a checkpoint: conditioned, if the model is
    best_step: int | None = None


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints in `directory`, oldest first; temporary ones are not among them."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def named_tensors(engine: Engine, ema: Ema | None) -> dict[str, Tensor]:
    """This rank's part of all that a checkpoint keeps. Copies only where the engine has to make them."""
    packed = {prefix: engine.pack(group) for prefix, group in _groups(engine, ema).items()}
    return _flat(packed) | _flat({WEIGHTS_PREFIX: engine.frozen()})


def _groups(engine: Engine, ema: Ema | None) -> dict[str, dict[str, Tensor]]:
    """Trained weights, averages and moments by prefix, as the engine holds them."""
    groups = {WEIGHTS_PREFIX: engine.parameters(), **{f"{kind}.": m for kind, m in engine.moments().items()}}
    if ema is not None:
        groups[EMA_PREFIX] = ema.average
    return groups


def _flat(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {prefix + name: value for prefix, group in groups.items() for name, value in group.items()}


def seal(directory: Path) -> None:
    """Write the list of all files with their sizes and hashes."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {str(p.relative_to(directory)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in paths}
    atomic_write_text(directory / SEAL, _seal_text({"files": files}))


def _seal_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def remove_leftovers(directory: Path) -> None:
    """Remove what a process that died in a save has left; only while no other process uses the run."""
    for path in [*directory.glob(".step_*.tmp"), *directory.glob(".step_*.old"), *directory.glob(".step_*.removed")]:
        shutil.rmtree(path, ignore_errors=True)


def verify_checkpoint(path: Path, *, hashes: bool = True) -> list[str]:
    """Problems of a checkpoint or export, each naming the file; empty when it is whole. Without `hashes` by sizes."""
    try:
        text = (path / SEAL).read_text()
        content = json.loads(text)
        files = content["files"]
    except (OSError, json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        return [f"{path / SEAL} is missing or damaged ({type(error).__name__})"]
    if text != _seal_text(content):
        return [f"{path / SEAL} is not as it was written"]
    return [problem for name, expected in files.items() if (problem := _verify_file(path / name, expected, hashes))]


def _verify_file(path: Path, expected: dict[str, Any], hashes: bool) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    if hashes and sha256_file(path) != expected["sha256"]:
        return f"{path} does not match its SHA-256"
    return None


def newest_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None if there is none), and what was wrong with the newer ones."""
    skipped: list[str] = []
    for path in reversed(list_checkpoints(directory)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, skipped
        skipped.append(f"skipped {path.name}: {'; '.join(problems)}")
    return None, skipped


def load_checkpoint(path: Path, engine: Engine, ema: Ema | None) -> TrainState:
    """Restore weights, optimizer and EMA in place, and return the state. The checkpoint must have been verified.

    It may come from another number of ranks, another mesh or another engine: every rank reads the slices that it holds.
    """
    state = TrainState(**json.loads((path / STATE_FILE).read_text()))
    groups = _groups(engine, ema)
    packed = {prefix: engine.pack(group) for prefix, group in groups.items()}
    read_tensors(path / TENSORS, _flat(packed) | _flat({WEIGHTS_PREFIX: engine.frozen()}))
    for prefix, group in groups.items():
        engine.unpack(packed[prefix], group)
    engine.load_parameters(groups[WEIGHTS_PREFIX])
    engine.set_optimizer_step(state.step)
    if ema is not None:
        ema.updates = state.ema_updates
    return state


def find_model(path: Path) -> Path:
    """The model directory that the user means by `path`: itself, or the newest good checkpoint of a run."""
    if (path / MODEL_FILE).is_file():
        problems = verify_checkpoint(path)
        if problems:
            raise UserError(f"{problems[0]}; use another checkpoint (see `scmdm checkpoint list RUN`)")
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a run directory, a checkpoint or an exported model")
    checkpoint, skipped = newest_checkpoint(path / "checkpoints")
    for line in skipped if checkpoint is not None else ():
        logger.warning("%s: %s", path, line)
    if checkpoint is None:
        reason = f" ({skipped[0]})" if skipped else ""
        raise UserError(
            f"{path} holds no checkpoint that verifies{reason}; give a run directory, a checkpoint or an export"
        )
    return checkpoint


def sha256_of_model(path: Path) -> str:
    """Hash of a checkpoint's or an export's list of hashes, to recognise a model."""
    return sha256_file(path / SEAL)
