"""Leases: exclusive use of a directory or a task by one process, among machines that share a file system.

A lease is a folder with one file per generation, `00000001.json` and so on. The process named in the highest generation
holds the lease. To take it over, a process creates the next generation's file exclusively (by a hard link, which is
atomic on NFS, too): exactly one of several contenders succeeds. Files are not removed, so generations only increase,
and a generation is a fencing token.

The holder renews the lease by setting its file's modification time. Another process takes the lease over

- at once if the holder has released it, if its process is gone from this machine, or if SLURM has ended its job;
- if the holder has not renewed it for `silence_limit_s` and SLURM does not report its job as alive. Both times are
  modification times on the same file system, so that only the file server's clock matters.

A holder that was suspended for longer than that may wake up without the lease. It must call `Fence.require` before it
commits anything; that raises `InUseError` if a higher generation exists. Processes that write on the holder's behalf,
such as the other ranks of a run, do the same with its `Fence`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from scmdm.errors import InUseError, UserError
from scmdm.system.files import cannot_write
from scmdm.system.liveness import LIVE_JOB_STATES, job_state, machine_id, process_lives, process_start
from scmdm.system.untrusted import parse_as, read_json

HEARTBEAT_S, SILENCE_LIMIT_S = 10.0, 300.0
_RECORD = re.compile(r"[0-9]{8,200}\.json")
_LARGEST_RECORD = 2**16  # bytes
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # file systems without hard links


@dataclass(frozen=True)
class LeaseHolder:
    """Process that holds, or held, a lease."""

    user: str
    host: str
    machine: str  # see `machine_id`
    pid: int
    pid_start: int | None  # see `process_start`
    job: str | None  # SLURM job
    job_restarts: int  # distinguishes a requeued job from its earlier starts
    since: str  # ISO 8601
    token: str  # random
    released: bool = False

    @staticmethod
    def current() -> LeaseHolder:
        """Describe this process."""
        return LeaseHolder(
            user=os.environ.get("USER") or f"uid {os.getuid()}",
            host=socket.gethostname(),
            machine=machine_id(),
            pid=os.getpid(),
            pid_start=process_start(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID"),
            job_restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f" in SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}, since {self.since}"


@dataclass(frozen=True)
class Fence:
    """Right to write on behalf of one generation of a lease. It can be sent to other processes."""

    name: str  # of the lease in errors
    path: Path  # file of the generation

    @property
    def generation(self) -> int:
        """The fencing token: larger than that of every earlier holder."""
        return _generation(self.path)

    def still_owned(self) -> bool:
        """Return whether no other process has taken the lease over."""
        # A client of a file server may not see the newest names yet, perhaps not even this generation's.
        return _generation(_newest(self.path.parent)) <= self.generation

    def require(self) -> None:
        """Raise InUseError if another process has taken the lease over. Call this before every commit."""
        if not self.still_owned():
            _, holder = read_lease(self.path.parent)
            raise InUseError(
                f"{self.name} was taken over by {holder or 'another process'} while this process was suspended; "
                "this process writes nothing more there"
            )


class Lease:
    """A lease that this process holds, or held until it was taken over."""

    def __init__(self, name: str, path: Path, holder: LeaseHolder, predecessor: LeaseHolder | None) -> None:
        self._path, self._holder = path, holder
        self.fence = Fence(name, path)
        self.predecessor = predecessor  # the previous holder if it did not release the lease
        self._stop = threading.Event()

    def renew(self) -> None:
        """Renew the lease every `HEARTBEAT_S` seconds until it is released or taken over."""
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                if not self.fence.still_owned():
                    return
                os.utime(self._path)

    def release(self) -> None:
        """Let other processes acquire the lease at once."""
        self._stop.set()
        with (
            contextlib.suppress(OSError),
            _temporary_record(self._path.parent, replace(self._holder, released=True)) as record,
        ):
            os.replace(record, self._path)


@contextlib.contextmanager
def acquire(
    directory: Path, name: str, *, silence_limit_s: float = SILENCE_LIMIT_S, ask_slurm: bool = True
) -> Iterator[Lease]:
    """Hold the lease kept in the folder `directory` while the block runs. The folder's parent must exist.

    `name` identifies the lease in errors, as in `run_dir=runs/qm9`. Raises InUseError, which names the holder, if
    another process holds the lease, and UserError if the folder cannot be written.
    """
    try:
        lease = _acquire(directory, name, silence_limit_s, ask_slurm=ask_slurm)
    except OSError as error:
        raise cannot_write(directory, error) from error
    threading.Thread(target=lease.renew, name="lease", daemon=True).start()
    try:
        yield lease
    finally:
        lease.release()


def read_lease(directory: Path) -> tuple[Path | None, LeaseHolder | None]:
    """Return the file of the newest generation and its content, each None if missing or damaged. Writes nothing."""
    path = _newest(directory)
    if path is None:
        return None, None
    try:
        return path, parse_as(LeaseHolder, read_json(path, "lease", limit=_LARGEST_RECORD), path)
    except (OSError, UserError):
        return path, None


def holder_lives(holder: LeaseHolder, me: LeaseHolder, *, ask_slurm: bool = True) -> bool | None:
    """Return whether a holder is alive according to the process table or SLURM; None if neither determines it.

    A process that exists on this machine may be suspended for good. It gives None, so that `silence_limit_s` decides.
    """
    if holder.machine == me.machine:
        return None if process_lives(holder.pid, holder.pid_start) else False
    if holder.job is not None and holder.job == me.job:  # SLURM restarts a job when its processes have ended
        return False if holder.job_restarts < me.job_restarts else None
    state = job_state(holder.job) if holder.job is not None and ask_slurm else None
    return None if state is None else state in LIVE_JOB_STATES


def _acquire(directory: Path, name: str, silence_limit_s: float, *, ask_slurm: bool) -> Lease:
    me = LeaseHolder.current()
    directory.mkdir(exist_ok=True)
    with _temporary_record(directory, me) as record:
        now = record.stat().st_mtime  # by the file server's clock
        while True:
            newest, holder = read_lease(directory)
            if newest is not None and not _is_free(newest, holder, me, now - silence_limit_s, ask_slurm):
                raise _in_use(name, holder)
            path = directory / f"{_generation(newest) + 1:08d}.json"
            if not _create_exclusively(record, path):
                continue
            return Lease(name, path, me, None if holder is None or holder.released else holder)


def _create_exclusively(record: Path, path: Path) -> bool:
    """Give `record` the name `path` as well; return False if another process has created that name."""
    try:
        os.link(record, path)
    except FileExistsError:
        return record.stat().st_nlink == 2  # on NFS a reply can be lost and the call repeated
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # Exclusive too, but a reader may find the file empty. It then waits, as for a silent holder.
        try:
            with open(path, "x") as file:
                file.write(record.read_text())
        except FileExistsError:
            return False
    return True


def _is_free(newest: Path, holder: LeaseHolder | None, me: LeaseHolder, renewed_before: float, ask_slurm: bool) -> bool:
    if holder is not None and holder.released:
        return True
    lives = holder_lives(holder, me, ask_slurm=ask_slurm) if holder is not None else None
    return newest.stat().st_mtime < renewed_before if lives is None else not lives


@contextlib.contextmanager
def _temporary_record(directory: Path, holder: LeaseHolder) -> Iterator[Path]:
    """Yield a complete record under a temporary name."""
    descriptor, name = tempfile.mkstemp(prefix=".lease.", dir=directory)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(holder), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _newest(directory: Path) -> Path | None:
    # List the directory: NFS clients cache for a while that a single name does not exist.
    try:
        names = [name for name in os.listdir(directory) if _RECORD.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return None
    return directory / max(names, key=lambda name: int(name.removesuffix(".json"))) if names else None


def _generation(path: Path | None) -> int:
    return 0 if path is None else int(path.stem)


def _in_use(name: str, holder: LeaseHolder | None) -> InUseError:
    stop = f"stop it (scancel {holder.job})" if holder is not None and holder.job else "stop it"
    return InUseError(
        f"{name} is in use by {holder or 'another process'}; wait for it, {stop}, or choose another directory"
    )
