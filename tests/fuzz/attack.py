"""One attack: copy a subject, change one of its files, run its command, and see what became of it."""

import contextlib
import io
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unicodedata import category

from scmdm.cli import main
from tests.fuzz.mutations import VICTIM, mutate
from tests.fuzz.subjects import Subject

PATIENCE_S = 60  # far beyond what any command takes
MEMORY = 4 * 2**30  # bytes that a command may take


class HangError(BaseException):
    """The command did not end; not an Exception, so that no reader turns it into a message."""


def attack(subject: Subject, shared: Path, place: Path, dice: Random) -> str | None:
    """Return what went wrong, None when the command succeeded or refused the file in one line.

    `place` is emptied. Wrong are: an exception, a hang, more than one line of an error, running out of memory, and any
    change of a file outside the command's own directories.
    """
    shutil.rmtree(place, ignore_errors=True)
    given, out = place / "given", place / "results" / "out"
    given.mkdir(parents=True)
    out.parent.mkdir()
    (place / VICTIM).write_text("kept")
    (given / VICTIM).write_text("kept")
    (given / "empty.yaml").write_text("{}\n")
    subject.build(given, shared)
    files = sorted({path for pattern in subject.files for path in given.glob(pattern) if path.is_file()})
    file = dice.choice(files)
    change = f"{subject.name}: {file.relative_to(given)}: {mutate(file, dice)}"
    before = _contents(place)
    fault = _run(subject.arguments(given, out)) or _changes(before, place, subject.keeps)
    return fault and f"{change}\n{fault}"


def _run(arguments: list[str]) -> str | None:
    output, errors = io.StringIO(), io.StringIO()
    with _memory(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), _patience():
        try:
            status = main(arguments)
        except (Exception, HangError, SystemExit):  # noqa: BLE001 - any of them is the finding
            return traceback.format_exc()
    said = [line for line in errors.getvalue().splitlines() if line.startswith("scmdm: error: ")]
    if "Traceback" in output.getvalue() + errors.getvalue():
        return output.getvalue() + errors.getvalue()
    if status not in (0, 1) and not said:
        return f"exit status {status} without a reason: {errors.getvalue()[-500:]}"
    if status and len(said) != 1:
        return f"exit status {status} with {len(said)} lines of errors: {errors.getvalue()[-500:]}"
    if said and ("MemoryError" in said[0] or any(category(letter) in ("Cc", "Cs") for letter in said[0])):
        return said[0]
    return None


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """Bound the memory, so that a file without an end costs a MemoryError and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    def give_up(number: int, frame: object) -> None:
        raise HangError(f"no end after {PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _contents(place: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below `place` but the results."""
    found = {}
    for folder, _, names in os.walk(place):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), place)] = (status.st_size, status.st_mtime_ns)
    return {name: status for name, status in found.items() if not name.startswith("results/")}


def _changes(before: dict[str, tuple[int, int]], place: Path, keeps: tuple[str, ...]) -> str | None:
    after = _contents(place)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    wrong = sorted(name for name in changed if not name.removeprefix("given/").startswith(keeps or ("\0",)))
    return f"changed outside of the output: {wrong}" if wrong else None
