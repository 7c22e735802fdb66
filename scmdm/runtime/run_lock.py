"""A run directory belongs to one run at a time.

Two locks guard it. The kernel's (`.lock`) goes with the process that holds it, but some shared file systems keep it
within a machine or have none. So the owner also signs (`.owner.json`: who, where, which job) and gives a sign of life;
whoever comes later asks SLURM, the process table or the age of that sign whether the owner lives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from scmdm.checkpoint.checkpoint import remove_leftovers
from scmdm.errors import InUseError, UserError
from scmdm.observability.metrics import logger
from scmdm.system.files import atomic_write_text
from scmdm.system.liveness import JOB_LIVES, job_state, process_lives
from scmdm.system.process_group import broadcast, current_world

BEAT_S, SILENT_S = 30.0, 300.0  # between signs of life; after so long without one the owner counts as dead
_NO_KERNEL_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Owner:
    """Who has signed; `restarts` tells a requeued job from itself before."""

    user: str
    host: str
    pid: int
    job: str | None
    restarts: int
    since: str
    token: str

    @staticmethod
    def me() -> Owner:
        job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        since = datetime.now(UTC).isoformat(timespec="seconds")
        user = os.environ.get("USER") or f"uid {os.getuid()}"
        return Owner(user, socket.gethostname(), os.getpid(), job, restarts, since, uuid.uuid4().hex)

    def __str__(self) -> str:
        job = f" in SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}, since {self.since}"


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Create the run directory, prove that it can be written, and keep every other run out of it.

    Raises InUseError, which names the owner, while another run has it.
    """
    _make(directory)
    signature = directory / ".owner.json"
    with contextlib.ExitStack() as held:
        kernel_lock = held.enter_context(_kernel_lock(directory / ".lock", signature))
        held.enter_context(_signed(directory, signature, kernel_lock=kernel_lock))
        remove_leftovers(directory / "checkpoints")
        yield


@contextlib.contextmanager
def claim_for_all(directory: Path) -> Iterator[None]:
    """Rank 0 claims, and all ranks hear how that went: none is left waiting for one that was refused."""
    with contextlib.ExitStack() as held:
        refused: UserError | None = None
        if current_world().is_main:
            try:
                held.enter_context(claim(directory))
            except UserError as error:
                refused = error
        refused = broadcast(refused)
        if refused is not None:
            raise refused
        yield


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run_dir={directory} cannot be made ({error.strerror}); choose a place that you may write to"
        ) from error
    atomic_write_text(directory / ".writable", "")
    (directory / ".writable").unlink()


@contextlib.contextmanager
def _kernel_lock(path: Path, signature: Path) -> Iterator[bool]:
    """Hold the kernel's lock; False where the file system has none."""
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise _in_use(signature.parent, read_owner(signature)) from error
    except OSError as error:
        if error.errno not in _NO_KERNEL_LOCK:
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def _signed(directory: Path, signature: Path, *, kernel_lock: bool) -> Iterator[None]:
    me = Owner.me()
    _sign(directory, signature, me, kernel_lock=kernel_lock)
    stop = threading.Event()
    threading.Thread(target=_beat, args=(signature, stop), name="claim", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        if read_owner(signature) == me:
            signature.unlink(missing_ok=True)


def _sign(directory: Path, signature: Path, me: Owner, *, kernel_lock: bool) -> None:
    """Sign an unowned directory, or as the heir of a dead owner.

    A dead owner's token names one file, and who makes that file is the heir: of many that come to the same verdict one
    inherits, however slow the others are. An heir that dies before its file has taken the signature's place has an
    heir of its own.
    """
    while True:
        place = _free_place(directory, signature, me, kernel_lock=kernel_lock)
        if place == signature:
            return
        if _last(signature) == place:
            break
        place.unlink(missing_ok=True)  # by now the signature is another's, no longer the dead one's
    gone = read_owner(signature) or "unreadable"
    logger.warning("run_dir=%s: its owner is gone (%s); taking it over", directory, gone)
    os.rename(place, signature)
    for left in directory.glob(f"{signature.name}.heir-*"):
        left.unlink(missing_ok=True)


def _free_place(directory: Path, signature: Path, me: Owner, *, kernel_lock: bool) -> Path:
    """Sign at the first place that nobody living has: the signature, or the heir's of one who is dead."""
    place = signature
    while not _create(place, me):
        owner = read_owner(place)
        if owner is None and not place.exists():
            place = signature
            continue
        if owner is not None and lives(owner, me, place, kernel_lock=kernel_lock):
            raise _in_use(directory, owner)
        place = _heir(signature, owner)
    return place


def _heir(signature: Path, owner: Owner | None) -> Path:
    return signature.with_name(f"{signature.name}.heir-{owner.token if owner is not None else 'unreadable'}")


def _last(signature: Path) -> Path:
    """The file of the last heir, or the signature itself."""
    place = signature
    while (heir := _heir(signature, read_owner(place))).exists():
        place = heir
    return place


def _create(signature: Path, me: Owner) -> bool:
    """Sign unless somebody has: complete or not at all, and atomic on network file systems, too (a hard link)."""
    descriptor, temporary = tempfile.mkstemp(prefix=".owner.", dir=signature.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(me), file)
        os.link(temporary, signature)
    except FileExistsError:
        return os.stat(temporary).st_nlink == 2  # NFS: the first answer was lost, and the call was sent again
    except OSError as error:
        raise UserError(f"cannot write {signature}: {error.strerror or error}; choose another run_dir") from error
    finally:
        os.unlink(temporary)
    return True


def read_owner(signature: Path) -> Owner | None:
    """The owner of a run directory; None without one, or when its file cannot be read."""
    try:
        content = json.loads(signature.read_text())
        return Owner(**{field.name: content[field.name] for field in fields(Owner)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lives(owner: Owner, me: Owner, signature: Path, *, kernel_lock: bool = True) -> bool:
    """Whether the owner of a directory is alive, as seen by one who holds its kernel lock, if there is such a thing."""
    if owner.host == me.host:
        return not kernel_lock and process_lives(owner.pid)
    if owner.job is not None and owner.job == me.job and owner.restarts < me.restarts:
        return False  # SLURM starts a job again when nothing is left of it
    state = job_state(owner.job) if owner.job is not None and owner.job != me.job else None
    return state in JOB_LIVES if state is not None else _silence(signature) < SILENT_S


def _silence(signature: Path) -> float:
    """Seconds since the owner's last sign of life, by the file server's clock: those of two machines may differ."""
    with tempfile.NamedTemporaryFile(prefix=".now.", dir=signature.parent) as now:
        now_s = os.fstat(now.fileno()).st_mtime
    try:
        return now_s - signature.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # it has just been released, or an heir has just become the owner


def _beat(signature: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(signature)


def _in_use(directory: Path, owner: Owner | None) -> InUseError:
    who = str(owner) if owner is not None else "another process"
    stop = f"stop it (scancel {owner.job})" if owner is not None and owner.job else "stop it"
    return InUseError(f"run_dir={directory} is in use by {who}; wait for it, {stop}, or choose another run_dir")
