"""Saving a run while it goes on: snapshot, write in the background, commit, retire.

A save has three parts. `snapshot` copies this rank's tensors and writes down all else; the training waits for it. Every
rank then writes its tensors into a directory with a temporary name, and rank 0 seals it, renames it, moves the pointer
and removes what is no longer kept. `train.async_checkpoint` puts the last two parts into a thread with a process group
of its own; how it went is agreed by all ranks at the next save, or at the end.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from scmdm.checkpoint.checkpoint import (
    POINTER,
    STATE_FILE,
    TrainState,
    checkpoint_name,
    list_checkpoints,
    named_tensors,
    seal,
    step_of,
)
from scmdm.config.training import TrainConfig
from scmdm.data.manifest import Manifest
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import Engine
from scmdm.errors import UserError
from scmdm.models.model_files import TENSORS, ModelSpec, write_model_files
from scmdm.models.tensor_files import write_tensors
from scmdm.system.files import atomic_directory, atomic_write_text
from scmdm.system.process_group import all_gather_object, broadcast

logger = logging.getLogger("scmdm")
Writer = Callable[[Path], None]


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint before it is written."""

    step: int
    best_step: int | None
    tensors: dict[str, Tensor]  # this rank's
    write_files: Writer  # rank 0: everything but the tensors, into a directory


def snapshot(
    engine: Engine,
    ema: Ema | None,
    state: TrainState,
    spec: ModelSpec,
    manifest: Manifest,
    tokenizer_file: Path,
    config_yaml: str,
    *,
    copy: bool,
) -> Snapshot:
    """What a checkpoint of this moment holds. With `copy`, training may go on while it is being written."""
    tensors = named_tensors(engine, ema)
    if copy:
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    kept, spec = json.dumps(asdict(state), indent=2) + "\n", ModelSpec(**vars(spec))

    def write_files(directory: Path) -> None:
        write_model_files(directory, spec, manifest, tokenizer_file)
        atomic_write_text(directory / STATE_FILE, kept)
        atomic_write_text(directory / "config.yaml", config_yaml)

    return Snapshot(state.step, state.best_step, tensors, write_files)


class Saver:
    """The saves of one run. All ranks call every method together."""

    def __init__(self, directory: Path, engine: Engine, config: TrainConfig) -> None:
        self._directory, self._config, self._main = directory, config, engine.rank == 0
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        background = config.async_checkpoint and dist.is_initialized()
        # Collectives of the thread must not meet those of the step: they have a group of their own.
        self._group = dist.new_group(backend="gloo") if background else None

    def save(self, taken: Snapshot, *, wait: bool = False) -> None:
        """Write `taken`; `wait` for it to be complete (the end of a run) whatever the configuration says.

        A disk that is full or cannot be written leaves all earlier checkpoints as they are: UserError, or with
        `train.on_save_error=continue` a warning; but a save that is waited for must succeed.
        """
        self.finish()
        final = self._directory / checkpoint_name(taken.step)
        stack, temporary = self._stage(final)
        if temporary is not None and self._config.async_checkpoint and not wait:
            arguments = (taken, stack, temporary, final, self._group)
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
            return
        if temporary is not None:
            self._write(taken, stack, temporary, final, None)
        self._settle(must=wait)

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one, and say how it went. Raises like `save`."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._settle(must=False)

    def abandon(self) -> None:
        """Wait for the save that is under way without asking the other ranks: one of them may have failed."""
        if self._thread is not None:
            self._thread.join(timeout=60)

    def _stage(self, final: Path) -> tuple[ExitStack, Path | None]:
        """The directory that all ranks write into, made by rank 0; None when it could not be made."""
        stack, temporary = ExitStack(), None
        if self._main:
            try:
                # A checkpoint of that name can only be one that did not verify.
                temporary = stack.enter_context(atomic_directory(final, replace=True))
            except UserError as error:
                self._problem = str(error)
        return stack, broadcast(temporary)

    def _write(
        self, taken: Snapshot, stack: ExitStack, temporary: Path, final: Path, group: dist.ProcessGroup | None
    ) -> None:
        """Every rank writes its tensors, rank 0 the rest. A failure is kept: it may be another thread's to raise."""
        try:
            with stack:
                write_tensors(temporary / TENSORS, taken.tensors, group=group)
                if self._main:
                    taken.write_files(temporary)
                    seal(temporary)
            if self._main:
                atomic_write_text(self._directory / POINTER, final.name + "\n")
                retire(self._directory, final, self._config, taken.best_step)
        except UserError as error:
            self._problem = str(error)
        except OSError as error:
            self._problem = f"cannot write {final}: {error.strerror or error}; free space or choose another place"
        except RuntimeError as error:  # another rank's failure reaches this one through a collective
            self._problem = f"cannot write {final}: {' '.join(str(error).split())[:200]}"
        else:
            logger.info("saved %s", final)

    def _settle(self, *, must: bool) -> None:
        """Agree on how a save went."""
        problems = [problem for problem in all_gather_object(self._problem) if problem is not None]
        self._problem = None
        if not problems:
            return
        if must or self._config.on_save_error == "stop":
            raise UserError(problems[0])
        logger.warning("%s; going on with the checkpoint before it", problems[0])


def retire(directory: Path, newest: Path, config: TrainConfig, best_step: int | None) -> None:
    """Remove what is not kept: all but the last `train.keep_last` up to `newest`, every `train.keep_every` steps, the
    best, and whatever comes after `newest` - the resume skipped that as damaged."""
    found = list_checkpoints(directory)
    at = found.index(newest)
    kept = set(found[: at + 1][-config.keep_last :])
    for path in found[:at]:
        step = step_of(path)
        if (config.keep_every and step % config.keep_every == 0) or (config.keep_best and step == best_step):
            kept.add(path)
    for path in found:
        if path in kept:
            continue
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)
