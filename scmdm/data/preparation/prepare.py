"""`scmdm prepare`: make a data set from a corpus, with any number of processes and machines.

The corpus is cut into parts. Each phase is a set of tasks, one per part, that `task_queue` distributes: hash the files;
scan the records (clean, hash, collect symbols); fit (find duplicates, build the tokenizer); encode into shards. Finally
the shards get one index and one manifest, and the directory is renamed. Finished tasks are kept in `.OUT.KEY.work`
beside `out`, from which an interrupted preparation continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from scmdm.config.fields import rules_of
from scmdm.config.loading import read_config
from scmdm.config.preparation import PrepareConfig, SectionConfig
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.encode import describe, encode
from scmdm.data.preparation.fit_tokenizer import (
    first_places,
    fit,
    fitted_tokenizer,
    given_tokenizer,
    no_usable_record,
    total_counts,
)
from scmdm.data.preparation.records import PLACES, Part, cut_into_parts, join_parts
from scmdm.data.preparation.scan import describe_groups, hash_files, sampled_share, scan
from scmdm.data.preparation.shard_writer import check_place, is_up_to_date, join_pieces
from scmdm.data.preparation.source import Source, make_source
from scmdm.data.preparation.splits import require_effective_fractions, splits_of
from scmdm.data.preparation.task_queue import Task, Worker, read_result, run_tasks
from scmdm.data.remote import upload_dataset
from scmdm.errors import UserError
from scmdm.system.files import require_writable, sha256_file
from scmdm.system.lease import Fence
from scmdm.system.terminal import Terminal

# Keys that do not change the data set.
_UNRECORDED = ("out", "source", "tokenizer", "overwrite", "upload", "workers", "slice", "on_dirty")
# Other keys are recorded only with values other than their defaults, so that new keys leave old manifests valid.
_ALWAYS_RECORDED = (
    "length",
    "pad_policy",
    "bos_policy",
    "validation_fraction",
    "test_fraction",
    "limit",
    "shard_mb",
)
# Recorded in every manifest since the first version, for any source and tokenizer.
_COMMON_DEFAULTS = {"text_key": "text", "vocab_size": 2048}
_PHASES = {
    "hash": "hashing",
    "scan": "scanning",
    "fit": "fitting the tokenizer",
    "encode": "encoding",
    "join": "joining",
}
ShowProgress = Callable[[str], None]


def prepare(config: PrepareConfig) -> Manifest:
    """Make the data set of a configuration unless `out` holds it, then upload it if so configured. Raises UserError."""
    console, started, root = Terminal(), time.monotonic(), Path(config.out)
    check_place(root, config.overwrite)
    before = root.stat().st_ino if root.exists() else None
    preparation = _Preparation.of(config)
    try:
        with _display(console) as show:
            places = _run_workers(preparation, show)
    except UserError:
        if preparation.work.is_dir():
            kept = f"finished work is kept in {preparation.work}; the same command continues from it"
            console.print(kept, soft_wrap=True)
        raise
    manifest = Manifest.read(root)
    if root.stat().st_ino == before:
        console.print(f"{root} is up to date", soft_wrap=True)
    else:
        _summarise(console, root, manifest, {**preparation.source.skipped, **places}, time.monotonic() - started)
    if config.upload is not None and config.machine[0] == 0:
        upload_dataset(root, config.upload)
        console.print(f"uploaded to {config.upload}", soft_wrap=True)
    return manifest


@contextmanager
def _display(console: Terminal) -> Iterator[ShowProgress]:
    """Display the progress: one line that changes on a terminal, elsewhere a line per phase."""
    shown: list[str] = []
    with console.status("") as status:

        def show(text: str) -> None:
            status.update(text)
            phase = text.split(":")[0]
            if phase not in shown and not console.is_terminal:
                console.print(phase, soft_wrap=True)
                shown.append(phase)

        yield show


def _run_workers(preparation: _Preparation, show: ShowProgress) -> dict[str, list[str]]:
    """Run the preparation in this process and in further worker processes.

    Returns the first places of what was dropped, by reason; they are lost where another machine has finished the data
    set.
    """
    from scmdm.system.worker_processes import worker_processes

    config = preparation.config
    if preparation.work.is_dir():
        show(f"continuing from {preparation.work}")
    require_writable(Path(config.out))
    preparation.work.mkdir(exist_ok=True)
    machine, machines = config.machine
    processes = min(config.workers or len(os.sched_getaffinity(0)), len(preparation.parts))
    own, *others = (Worker(machine * processes + index, machines * processes) for index in range(processes))
    if not others:
        return preparation.run(own, show)
    with worker_processes(len(others)) as pool:
        # As a dict: the class of a configuration is made when it is loaded, and cannot be pickled.
        futures = [pool.submit(_run, asdict(config), worker) for worker in others]

        def show_unless_failed(text: str) -> None:
            for future in futures:
                if future.done():
                    _raise_error(future)
            show(text)

        places = preparation.run(own, show_unless_failed)
        for future in futures:
            _raise_error(future)
            places = places or ({} if future.exception() else future.result())
        return places


def _raise_error(future: Future[dict[str, list[str]]]) -> None:
    """Raise the error of a worker. If it was killed, only warn: this process does the remaining work."""
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        warnings.warn(_KILLED, stacklevel=2)
    elif error is not None:
        raise error


_KILLED = (
    "a worker was killed, perhaps for lack of memory, which ended all workers; this process continues alone. To use "
    "several again, stop it and repeat the command with a smaller workers=N"
)


def _run(content: dict[str, Any], worker: Worker) -> dict[str, list[str]]:
    config = read_config(PrepareConfig, content, "in the worker's configuration")
    return _Preparation.of(config).run(worker, lambda _: None)


@dataclass(frozen=True)
class _Preparation:
    """A corpus, its parts, and the directory of intermediate results."""

    config: PrepareConfig
    source: Source
    parts: list[Part]
    work: Path
    tokenizer: str | None  # SHA-256 of an existing one

    @staticmethod
    def of(config: PrepareConfig) -> _Preparation:
        source, out = make_source(config), Path(config.out)
        require_effective_fractions(config, source)
        _require_possible_framing(config, source)
        parts = source.parts(config.part_mb << 20)
        if config.limit is not None:
            parts = join_parts(parts)  # the first records are found only in sequence
        found = {name: _identity(path) for name, path in source.files().items()}
        tokenizer = _tokenizer_hash(config)
        inputs = [recorded_options(config), found, tokenizer]
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
        return _Preparation(config, source, parts, out.parent / f".{out.name}.{key}.work", tokenizer)

    def run(self, worker: Worker, show: ShowProgress) -> dict[str, list[str]]:
        """Do a worker's share and any unclaimed work until the data set is complete.

        Returns the first places of what was dropped, by reason; none if another worker has removed the results.
        """
        root = Path(self.config.out)
        groups = cut_into_parts(self.source.files(), self.config.part_mb << 20)
        self._phase("hash", [partial(hash_files, self.source, group) for group in groups], worker, show)
        described = self._described(len(groups))
        try:
            if described is None or is_up_to_date(root, described, self.config.overwrite):
                self._remove_work()
                return {}
        except UserError:
            self._remove_work()
            raise
        places = self._make(described, worker, show)
        self._remove_work()
        return places

    def _make(self, described: dict[str, Any], worker: Worker, show: ShowProgress) -> dict[str, list[str]]:
        def on_read(records: int) -> None:
            if records % 10_000 == 0:
                show(f"scanning: {records:,} records of a part")

        config, source, parts = self.config, self.source, self.parts
        sampled = sampled_share(config, source)
        self._phase("scan", [partial(scan, config, source, part, sampled, on_read) for part in parts], worker, show)
        scans, fitted = self._results("scan", len(parts)), self.work / "fit-00000"
        self._phase("fit", [partial(fit, config, source, scans)], worker, show)
        encodings = [
            partial(encode, config, source, part, scan, fitted, number)
            for number, (part, scan) in enumerate(zip(parts, scans, strict=True))
        ]
        self._phase("encode", encodings, worker, show)
        encoded = self._results("encode", len(parts))
        places = self._places([*(scan / "scan.json" for scan in scans), *(to / "counts.json" for to in encoded)])
        self._run_phase("join", [partial(self._join, described, scans)], worker, show)
        return places

    def _places(self, files: Sequence[Path]) -> dict[str, list[str]]:
        try:
            return first_places(files)
        except FileNotFoundError:
            return {}

    def _phase(self, name: str, runs: Sequence[Callable[[Path], None]], worker: Worker, show: ShowProgress) -> None:
        """Complete tasks that write nothing but their results."""

        def without_fence(run: Callable[[Path], None]) -> Callable[[Path, Fence], None]:
            return lambda to, _: run(to)

        self._run_phase(name, [without_fence(run) for run in runs], worker, show)

    def _run_phase(
        self, name: str, runs: Sequence[Callable[[Path, Fence], None]], worker: Worker, show: ShowProgress
    ) -> None:
        def on_done(count: int) -> None:
            show(f"{_PHASES[name]}: {count} of {len(runs)} parts")

        show(_PHASES[name])
        tasks = [Task(path.name, run) for path, run in zip(self._results(name, len(runs)), runs, strict=True)]
        run_tasks(self.work, tasks, worker, on_done)

    def _results(self, phase: str, count: int) -> list[Path]:
        return [self.work / f"{phase}-{number:05}" for number in range(count)]

    def _described(self, groups: int) -> dict[str, Any] | None:
        """Describe the corpus for the manifest; None when other workers have finished the data set."""
        try:
            found = [read_result(path / "hashes.json", dict[str, str]) for path in self._results("hash", groups)]
        except FileNotFoundError:
            return None
        files = {name: digest for hashes in found for name, digest in hashes.items()}
        described = {"name": self.source.name, "files": files, "options": recorded_options(self.config)}
        return described if self.tokenizer is None else {**described, "tokenizer": self.tokenizer}

    def _join(self, described: dict[str, Any], scans: Sequence[Path], to: Path, fence: Fence) -> None:
        # A worker may have been killed after it had made the data set, before it recorded that.
        if is_up_to_date(Path(self.config.out), described, self.config.overwrite):
            return
        encoded = self._results("encode", len(self.parts))
        files = [*((scan / "scan.json") for scan in scans), *((piece / "counts.json") for piece in encoded)]
        counts = total_counts(files)
        if not counts.get("kept"):
            raise UserError(no_usable_record(files))
        skipped = {f"skipped: {reason}": len(names) for reason, names in self.source.skipped.items()}
        description = describe(self.config, self.source, described, dict(sorted((counts | skipped).items())))
        tokenizer = fitted_tokenizer(self.work / "fit-00000")
        splits, overwrite = splits_of(self.config, self.source), self.config.overwrite
        join_pieces(
            Path(self.config.out),
            encoded,
            splits,
            tokenizer,
            description,
            optional=_optional_splits(self.config, self.source.published),
            overwrite=overwrite,
            why_empty=partial(describe_groups, scans),
            before_commit=fence.require,
        )

    def _remove_work(self) -> None:
        """Remove the intermediate results. The directory is renamed first: other workers stop when it is gone."""
        removed = self.work.with_suffix(f".{os.getpid()}.old")
        with suppress(FileNotFoundError):
            self.work.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _require_possible_framing(config: PrepareConfig, source: Source) -> None:
    """Raise UserError where records that are grids, or have labels, are to share a sample."""
    kind = "are grids of values" if source.layout is not None else "have labels" if source.labels else None
    if kind is not None and config.framing != "records":
        raise UserError(
            f"framing={config.framing} is not possible with source.name={config.source.name}, whose records {kind}; it "
            "must be records"
        )


def _optional_splits(config: PrepareConfig, published: Sequence[str]) -> tuple[str, ...]:
    """Return the splits that may be empty, of a corpus that publishes its own.

    A small corpus that publishes its own validation set may leave nothing for a test set that it lacks.
    """
    unpublished = [] if not published else [name for name in ("validation", "test") if name not in published]
    return tuple(name for name in unpublished if name == "test" or config.validation_fraction == 0)


def recorded_options(config: PrepareConfig) -> dict[str, Any]:
    """Return the keys that determine a data set, in the flat form of manifests, under the first of their names."""
    options: dict[str, Any] = {
        **_COMMON_DEFAULTS,
        "source": config.source.name,
        "tokenizer": config.tokenizer.name,
        **_changed_keys(config.source),
        **_changed_keys(config.tokenizer),
    }
    for field in fields(PrepareConfig):
        value = getattr(config, field.name)
        if field.name not in _UNRECORDED and (field.name in _ALWAYS_RECORDED or value != field.default):
            options[field.name] = value
    return options


def _changed_keys(section: SectionConfig) -> dict[str, Any]:
    """Return the recorded keys of a section that differ from their defaults, under the first of their names."""
    changed = {}
    for field in fields(section):
        value, rules = getattr(section, field.name), rules_of(field)
        if field.name not in {"name", *section.unrecorded} and value != field.default:
            changed[rules.formerly[0] if rules and rules.formerly else field.name] = value
    return changed


def _tokenizer_hash(config: PrepareConfig) -> str | None:
    """Return the SHA-256 of an existing tokenizer as the data set will store it; None when one is built."""
    tokenizer = given_tokenizer(config)
    if tokenizer is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return sha256_file(tokenizer.save(Path(folder)))


def _identity(path: Path) -> tuple[int, int]:
    """Return size and time of a file, to detect changes when a preparation continues. The manifest has hashes."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _summarise(
    console: Terminal, root: Path, manifest: Manifest, places: Mapping[str, Sequence[str]], seconds: float
) -> None:
    console.print(f"{manifest.tokenizer.kind} tokenizer with {manifest.vocab_size} ids")
    for name, split in manifest.splits.items():
        text = f"{name:<12}{split.samples:>10,} sequences {split.tokens:>13,} tokens {len(split.files) - 1:>4} shards"
        console.print(text)
    records = ", ".join(f"{k} {v:,}" for k, v in manifest.counts.items())
    console.print(f"records: {records}", soft_wrap=True)
    for reason, found in places.items():
        name = reason if reason in manifest.counts else f"skipped: {reason}"
        console.print(f"{name}: {'; '.join(found[:PLACES])}", soft_wrap=True)
    rate = manifest.counts["read"] / seconds
    console.print(f"wrote {root} in {seconds:.1f} s, {rate:,.0f} records a second", soft_wrap=True)
