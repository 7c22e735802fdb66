"""Checks before the first step: all ranks run the same code on the same data, and disks have space.

Every rank collects a `RankReport`, which `compare` checks against that of rank 0. Differences that would make the ranks
compute different things, and disks too small for the first checkpoint, end the run with one line; others are warnings.
Finally the all-reduce between the ranks is measured.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from scmdm.checkpoint.reader import list_checkpoints
from scmdm.checkpoint.seal import sha256_of_model
from scmdm.config.loading import flatten
from scmdm.config.run import RunConfig
from scmdm.data.mixture import DataMixture
from scmdm.data.mosaic_streaming import bytes_to_int
from scmdm.data.shard_files import disk_needs
from scmdm.errors import UserError
from scmdm.models.lora import is_trained
from scmdm.models.model_files import ModelSpec, StoredModel
from scmdm.models.network import count_parameters
from scmdm.observability.environment import PACKAGES
from scmdm.observability.run_metrics import logger
from scmdm.system.extras import installed_version
from scmdm.system.files import atomic_write_text
from scmdm.system.process_group import World, barrier, broadcast, gather_object, on_rank_0
from scmdm.system.run_directory import CHECKPOINTS

# Kinds of values that must be equal on all ranks, and remedies. Earlier differences explain later ones.
REMEDIES = {
    "version of": "install the same packages on every machine",
    "source file": "install the same scmdm on every machine",
    "key": "start every rank with the same configuration",
    "SHA-256 of": "give every machine the same data and base",
    "mark in": "put run_dir on a file system that all machines share",
    "model of": "",
}
_WARNINGS_ONLY = ("model of",)  # ranks on different hardware wait for the slowest, and round differently
_MARK = ".start"
_SKEW_WARNING_S, _SKEW_ERROR_S = 5.0, 300.0  # object stores and schedulers refuse a larger skew, too
_MIB = 2**20
_SHM_NEEDED, _SHM_WANTED = 16 * _MIB, 256 * _MIB
_MESSAGE = 4 * _MIB  # bytes of the measured all-reduce


@dataclass(frozen=True)
class DiskSpace:
    """Free space on a file system that a rank writes to."""

    key: str
    path: str
    free: int  # bytes
    needed: int  # bytes; with fewer the run fails
    wanted: int  # bytes; with fewer the run may fail later
    remedy: str


@dataclass(frozen=True)
class RankReport:
    """Software, configuration, inputs and machine of one rank."""

    rank: int
    host: str
    same: Mapping[str, Mapping[str, str]]  # kind (of REMEDIES) -> key -> value
    disks: tuple[DiskSpace, ...]
    clock: float  # Unix time, read by all ranks at the same moment


@dataclass(frozen=True)
class PreflightProblem:
    """Difference between ranks, or shortage of disk space."""

    fatal: bool
    text: str


@dataclass(frozen=True)
class PreflightReport:
    """Result of the checks, for the log and for `starts.jsonl`, which rank 0 writes."""

    hosts: tuple[str, ...]  # one per rank; on rank 0 alone
    source_sha256: str
    seconds: float
    skew_s: float  # the largest of any rank; on rank 0 alone
    all_reduce_gb_per_s: float | None  # bus bandwidth, which does not depend on the number of ranks; None: one process
    all_reduce_latency_us: float | None
    warnings: tuple[str, ...]  # on rank 0 alone


def run_preflight(
    config: RunConfig,
    data: DataMixture,
    spec: ModelSpec,
    base: StoredModel | None,
    directory: Path,
    world: World,
    device: torch.device,
) -> PreflightReport:
    """Compare all ranks and measure their all-reduce. All ranks call this together, and all raise UserError."""
    began = time.perf_counter()
    on_rank_0(lambda: atomic_write_text(directory / _MARK, uuid.uuid4().hex))
    report = collect(config, data, spec, base, directory, world, device)
    barrier()
    report = replace(report, clock=time.time())
    first = broadcast(report)
    gathered = gather_object((report.host, report.clock - first.clock, compare(first, report)))
    found = gathered or []  # of rank 0
    problems = [problem for _, _, of_rank in found for problem in of_rank]
    on_rank_0(lambda: _conclude(directory / _MARK, problems))
    speed, latency = _measure_all_reduce(device) if world.size > 1 else (None, None)
    source = hashlib.sha256(repr(sorted(report.same["source file"].items())).encode()).hexdigest()
    return PreflightReport(
        hosts=tuple(host for host, *_ in found),
        source_sha256=source,
        seconds=time.perf_counter() - began,
        skew_s=max((abs(skew) for _, skew, _ in found), default=0.0),
        all_reduce_gb_per_s=speed,
        all_reduce_latency_us=latency,
        warnings=tuple(problem.text for problem in problems),
    )


def collect(
    config: RunConfig,
    data: DataMixture,
    spec: ModelSpec,
    base: StoredModel | None,
    directory: Path,
    world: World,
    device: torch.device,
) -> RankReport:
    """Collect this rank's report, whose clock is set later."""
    same = {
        "version of": _versions(),
        "source file": source_hashes(Path(__file__).parents[1]),
        "key": _configuration(config),
        "SHA-256 of": _inputs(data, base),
        "mark in": {"run_dir": _read_mark(directory)},
        "model of": {device.type: _device_name(device)},
    }
    disks = [*_run_disks(config, spec, directory)] if world.is_main else []
    if world.local_rank == 0:
        disks += [*_machine_disks(config, data)]
    return RankReport(world.rank, socket.gethostname(), same, tuple(disks), 0.0)


def compare(first: RankReport, own: RankReport) -> list[PreflightProblem]:
    """List a rank's differences from rank 0, and its shortages of disk space."""
    return [*_differences(first, own), *_skew(first, own), *_shortages(own)]


def _differences(first: RankReport, own: RankReport) -> Iterator[PreflightProblem]:
    for kind, remedy in REMEDIES.items():
        theirs, ours = first.same.get(kind, {}), own.same.get(kind, {})
        for key in {**theirs, **ours}:
            here, there = ours.get(key, "missing"), theirs.get(key, "missing")
            if here != there:
                yield PreflightProblem(
                    kind not in _WARNINGS_ONLY,
                    f"rank {own.rank} on {own.host}: {kind} {key} is {_short(here)}, but {_short(there)} on rank "
                    f"{first.rank} on {first.host}{'; ' if remedy else ''}{remedy}",
                )


def _skew(first: RankReport, own: RankReport) -> Iterator[PreflightProblem]:
    skew = own.clock - first.clock
    if abs(skew) > _SKEW_WARNING_S:
        yield PreflightProblem(
            abs(skew) > _SKEW_ERROR_S,
            f"rank {own.rank} on {own.host}: its clock shows {own.clock:.1f}, but {first.clock:.1f} on rank "
            f"{first.rank} on {first.host} ({skew:+.1f} s); synchronize both clocks",
        )


def _shortages(own: RankReport) -> Iterator[PreflightProblem]:
    for disk in own.disks:
        if disk.free < max(disk.needed, disk.wanted):
            fatal = disk.free < disk.needed
            least = disk.needed if fatal else disk.wanted
            yield PreflightProblem(
                fatal,
                f"rank {own.rank} on {own.host}: {disk.key}={disk.path} has {_size(disk.free)} free, "
                f"but {'needs' if fatal else 'should have'} {_size(least)}; {disk.remedy}",
            )


def _conclude(mark: Path, problems: list[PreflightProblem]) -> None:
    """Remove the mark that all ranks have looked for. Raises UserError if a problem is fatal."""
    mark.unlink(missing_ok=True)
    _refuse_fatal(problems)


def _refuse_fatal(problems: list[PreflightProblem]) -> None:
    """Raise UserError if a problem is fatal."""
    fatal = [problem.text for problem in problems if problem.fatal]
    if fatal:
        raise UserError(fatal[0] + (f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""))


def log_preflight(report: PreflightReport) -> None:
    """Log warnings and the measured all-reduce."""
    for text in report.warnings:
        logger.warning("%s", text)
    if report.all_reduce_gb_per_s is None:
        return
    logger.info(
        "%d ranks on %d machine(s) agree (checked in %.2f s): all-reduce of %d MiB at %.2f GB/s, latency %.0f us, "
        "clock skew %.3f s",
        len(report.hosts),
        len(set(report.hosts)),
        report.seconds,
        _MESSAGE // _MIB,
        report.all_reduce_gb_per_s,
        report.all_reduce_latency_us,
        report.skew_s,
    )


def source_hashes(package: Path) -> dict[str, str]:
    """Hash every source file with SHA-256; unlike a git revision, the hashes cover uncommitted changes."""
    return {
        str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*.py"))
    }


def _versions() -> dict[str, str]:
    found = {name: str(installed_version(name)) for name in (*PACKAGES, "deepspeed", "flash-attn")}
    return {"python": platform.python_version(), **found, "torch": torch.__version__, "CUDA": str(torch.version.cuda)}


def _configuration(config: RunConfig) -> dict[str, str]:
    """Return all keys except paths, which may differ between machines; `_inputs` compares the content instead."""
    flat = flatten(asdict(config))
    local = {"run_dir", "base", "data.path", *(f"data.streams.{name}.path" for name in config.data.streams)}
    return {key: str(value) for key, value in flat.items() if key not in local}


def _inputs(data: DataMixture, base: StoredModel | None) -> dict[str, str]:
    found = {"the data": data.manifest.fingerprint()}
    return found if base is None else {**found, "the base": sha256_of_model(base.path)}


def _read_mark(directory: Path) -> str:
    try:
        return (directory / _MARK).read_text()
    except OSError:
        return f"missing from {directory}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _run_disks(config: RunConfig, spec: ModelSpec, directory: Path) -> Iterator[DiskSpace]:
    """Require space for the kept checkpoints and one more, which a save writes before it removes the oldest."""
    model, copies = spec.build(), 2 + (config.ema.decay > 0)  # of what is trained: two moments, EMA
    trained = sum(parameter.numel() for name, parameter in model.named_parameters() if is_trained(name, config))
    size = 4 * (count_parameters(model) + copies * trained)  # all in float32
    missing = config.train.keep_last + 1 - len(list_checkpoints(directory / CHECKPOINTS))
    remedy = "free space, lower train.keep_last, or choose another run_dir"
    yield from _disk("run_dir", directory, size, size * max(1, missing), remedy)


def _machine_disks(config: RunConfig, data: DataMixture) -> Iterator[DiskSpace]:
    for source in data.streams:
        needed, wanted = disk_needs(source.root, source.manifest)
        if needed:
            if config.data.cache_limit is not None:
                wanted = min(wanted, bytes_to_int(config.data.cache_limit))
            remedy = "free space, set data.cache_limit, or put the cache on another disk"
            yield from _disk(source.key, source.root, needed, wanted, remedy)
    remedy = "give the container more shared memory (docker run --shm-size=1g)"
    yield from _disk("shared memory", Path("/dev/shm"), _SHM_NEEDED, _SHM_WANTED, remedy)


def _disk(key: str, path: Path, needed: int, wanted: int, remedy: str) -> Iterator[DiskSpace]:
    """Yield the free space at `path`, or nothing if the file system does not report its size, as some network ones."""
    if not path.exists():
        return
    usage = shutil.disk_usage(path)
    if usage.total > 0:
        yield DiskSpace(key, str(path), usage.free, needed, wanted, remedy)


def _measure_all_reduce(device: torch.device) -> tuple[float, float]:
    """Measure bus bandwidth in GB/s for `_MESSAGE` bytes, and latency in microseconds for one number."""
    ranks = dist.get_world_size()
    seconds, latency = _all_reduce_seconds(_MESSAGE // 4, 5, device), _all_reduce_seconds(1, 20, device)
    return 2 * (ranks - 1) / ranks * _MESSAGE / seconds / 1e9, 1e6 * latency


def _all_reduce_seconds(elements: int, repeats: int, device: torch.device) -> float:
    tensor = torch.zeros(elements, device=device)
    dist.all_reduce(tensor)  # the first one creates connections
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    _wait_for(device)
    return (time.perf_counter() - began) / repeats


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _short(value: str) -> str:
    return value if len(value) <= 160 else f"{value[:157]}..."


def _size(count: int) -> str:
    return f"{count / _MIB:,.0f} MiB" if count < 1024 * _MIB else f"{count / 2**30:,.1f} GiB"
