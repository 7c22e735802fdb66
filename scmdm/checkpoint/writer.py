"""Write checkpoints, in the background if configured.

A save has three parts. First this rank's tensors, and everything else that is stored, are captured; training waits for
it. Then every rank writes its tensors into a directory with a temporary name, and hashes them while it writes. Finally
rank 0 seals the hashes that it has gathered, renames the directory, updates the pointer to the newest checkpoint and
removes old ones. With `train.async_checkpoint` tensors are captured in host memory, and the last two parts run in a
thread with a process group of its own; the ranks agree on the result at the next save, or at the end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from scmdm.checkpoint.reader import checkpoint_name, list_checkpoints, step_of
from scmdm.checkpoint.retention import remove_old_checkpoints
from scmdm.checkpoint.seal import seal
from scmdm.checkpoint.staging import HostBuffers, Staged
from scmdm.checkpoint.train_state import STATE_FILE, TrainState, named_tensors
from scmdm.config.training import TrainConfig
from scmdm.data.manifest import Manifest
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import Engine
from scmdm.errors import InUseError, UserError
from scmdm.models.model_files import TENSORS, ModelSpec, write_model_files
from scmdm.models.tensor_files import write_tensors
from scmdm.system.files import atomic_directory, atomic_write_text, fsync_path, json_text
from scmdm.system.lease import Fence
from scmdm.system.process_group import broadcast, first_found
from scmdm.system.run_directory import CONFIG_FILE, LATEST_FILE
from scmdm.system.untrusted import describe

logger = logging.getLogger("scmdm")

_LAST_WAIT = 60  # seconds that a failed run waits for a save in progress


@dataclass(frozen=True)
class Snapshot:
    """Contents of a checkpoint that is to be written."""

    step: int
    best_step: int | None
    tensors: dict[str, Tensor]  # this rank's
    write_files: Callable[[Path], None]  # for rank 0: writes everything but the tensors into a directory


def snapshot(
    engine: Engine,
    ema: Ema | None,
    state: TrainState,
    spec: ModelSpec,
    manifest: Manifest,
    tokenizer_file: Path,
    config_yaml: str,
) -> Snapshot:
    """Describe the present state. Its tensors are the engine's own, which `CheckpointWriter.save` copies if needed."""
    tensors = named_tensors(engine, ema)
    state_json, spec = json_text(asdict(state), indent=2), ModelSpec(**vars(spec))

    def write_files(directory: Path) -> None:
        write_model_files(directory, spec, manifest, tokenizer_file)
        atomic_write_text(directory / STATE_FILE, state_json)
        atomic_write_text(directory / CONFIG_FILE, config_yaml)

    return Snapshot(state.step, state.best_step, tensors, write_files)


class CheckpointWriter:
    """Writer of the checkpoints of one run. All ranks call every method together.

    Nothing is written after another process has taken over the run of `fence`. Present checkpoints after `resumed_step`
    are damaged, otherwise the run would have resumed from them.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        config: TrainConfig,
        fence: Fence | None = None,
        *,
        resumed_step: int | None = None,
    ) -> None:
        self._directory, self._config, self._fence = directory, config, fence
        self._main = engine.rank == 0
        known = [] if resumed_step is None else list_checkpoints(directory)
        self._damaged = {path.name for path in known if step_of(path) > (resumed_step or 0)}
        self._thread: threading.Thread | None = None
        self._problem: UserError | None = None
        self._buffers = HostBuffers()
        background = config.async_checkpoint and dist.is_initialized()
        # The thread has its own group: its collectives must not interleave with those of the step.
        self._group = dist.new_group(backend="gloo") if background else None

    def save(self, captured: Snapshot, *, wait: bool = False) -> None:
        """Write a snapshot. With `wait`, return when it is complete, even with `train.async_checkpoint`.

        A failure to write leaves all earlier checkpoints intact and raises UserError, or logs a warning with
        `train.on_save_error=continue` unless `wait` is set. Raises InUseError if another run has taken the run
        directory over.
        """
        self.finish()
        final = self._directory / checkpoint_name(captured.step)
        stack, temporary = self._stage(final)
        if temporary is not None and self._config.async_checkpoint and not wait:
            arguments = (captured, self._copy(captured), stack, temporary, final, self._group)
            self._problem = UserError(f"cannot write {final}: its thread has ended; start the run again")
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
            return
        if temporary is not None:
            self._write(captured, None, stack, temporary, final, None)
        self._agree(strict=wait)

    def _copy(self, captured: Snapshot) -> Staged:
        """Copy tensors to host memory. A failure is raised in the thread, where the other ranks learn of it."""
        try:
            return self._buffers.stage(captured.tensors)
        except Exception as error:  # noqa: BLE001 - such as page-locked memory that the system refuses
            failure = error

        def fail() -> None:
            raise failure

        return Staged({}, fail)

    def finish(self) -> None:
        """Wait for the save in progress, if any. Raises as `save` does."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._agree(strict=False)

    def abandon(self) -> None:
        """Wait for this rank's part of the save in progress, but not for other ranks, which may have failed.

        The ranks no longer agree on its result, so that each one logs its own failure.
        """
        if self._thread is None:
            return
        self._thread.join(timeout=_LAST_WAIT)
        if self._thread.is_alive():
            logger.warning(
                "the save in progress has not ended within %d s, and does not count: the disk is slow, or another rank "
                "has not answered",
                _LAST_WAIT,
            )
        elif self._problem is not None:
            logger.warning("%s", self._problem)

    def _stage(self, final: Path) -> tuple[ExitStack, Path | None]:
        """Return the directory that all ranks write into, created by rank 0; None if that failed."""
        stack, temporary = ExitStack(), None
        if self._main:
            try:
                self._require_lease()
                # An existing checkpoint of that name is damaged, otherwise the run would have resumed from it.
                temporary = stack.enter_context(atomic_directory(final, replace=True, flushed=True))
            except UserError as error:
                self._problem = self._cause(error)
        return stack, broadcast(temporary)

    def _write(
        self,
        captured: Snapshot,
        staged: Staged | None,
        stack: ExitStack,
        temporary: Path,
        final: Path,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Write this rank's tensors; on rank 0 also commit. Failures are kept for `_agree`, in the calling thread."""
        try:
            with stack:
                self._write_files(captured, staged, temporary, group)  # leaving the block renames the directory
            if self._main:
                self._require_lease()
                atomic_write_text(self._directory / LATEST_FILE, final.name + "\n")
                self._damaged.discard(final.name)
                remove_old_checkpoints(
                    self._directory, final, self._config, captured.best_step, self._damaged, before=self._require_lease
                )
        except UserError as error:
            self._problem = self._cause(error)
        except BaseException as error:  # lost in a thread, where the save would count as complete
            problem = UserError(f"cannot write {final}: {describe(error)}; free space or choose another place")
            self._problem = self._cause(problem)
            if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                raise  # such as KeyboardInterrupt
        else:
            self._problem = None
            logger.info("saved %s", final)

    def _write_files(
        self, captured: Snapshot, staged: Staged | None, temporary: Path, group: dist.ProcessGroup | None
    ) -> None:
        """Write and flush everything; on rank 0 also seal it."""
        tensors = temporary / TENSORS
        values = staged.values if staged is not None else None

        def before() -> None:
            self._require_lease()
            if staged is not None:
                staged.wait()

        hashes = write_tensors(tensors, captured.tensors, values=values, before=before, group=group)
        if not self._main:
            return
        captured.write_files(temporary)
        seal(temporary, {f"{TENSORS}/{name}": found for name, found in hashes.items()})
        for path in [*temporary.iterdir(), temporary]:  # the ranks have flushed their files
            fsync_path(path)
        self._require_lease()

    def _require_lease(self) -> None:
        if self._fence is not None:
            self._fence.require()

    def _cause(self, problem: UserError) -> UserError:
        """Return the loss of the lease instead of what follows from it: a new owner removes unfinished saves."""
        try:
            self._require_lease()
        except UserError as lost:
            return lost
        return problem

    def _agree(self, *, strict: bool) -> None:
        """Agree with the other ranks on the result of a save."""
        problem, self._problem = first_found(self._problem), None
        if problem is None:
            return
        # Only rank 0, the first, has a lease to lose.
        if strict or isinstance(problem, InUseError) or self._config.on_save_error == "stop":
            raise problem
        if self._main:
            logger.warning("%s; continuing with the previous checkpoint", problem)
