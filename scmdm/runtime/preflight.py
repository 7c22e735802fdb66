"""Before the first step: do all ranks run the same thing, on machines that can take it, and how fast do they talk?

Every rank collects its `Facts`; `compare` holds them against those of rank 0. What would make the ranks compute
different things, or end the run at its first save, ends it here with one line; what is merely suspicious is a warning.
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

from scmdm.checkpoint.checkpoint import list_checkpoints, sha256_of_model
from scmdm.config.loading import flatten
from scmdm.config.run import RunConfig
from scmdm.data.manifest import remote_of
from scmdm.data.mixture import DataMixture, DataStream
from scmdm.data.mosaic_streaming import bytes_to_int
from scmdm.errors import UserError
from scmdm.models.model_files import ModelSpec, StoredModel
from scmdm.models.network import count_parameters
from scmdm.observability.environment import PACKAGES, installed_version
from scmdm.observability.metrics import logger
from scmdm.system.files import atomic_write_text
from scmdm.system.process_group import World, all_gather_object, barrier, broadcast

# What must be the same on all ranks, in the order in which a difference is told: the earlier explain the later.
REMEDIES = {
    "version of": "install the same packages on every machine",
    "source file": "install the same scmdm on every machine",
    "key": "start every rank with the same configuration",
    "SHA-256 of": "give every machine the same data and base",
    "mark in": "put run_dir on a file system that all machines share",
    "model of": "",
}
_SUSPICIOUS = ("model of",)  # ranks on different hardware wait for the slowest, and round differently
_MARK = ".start"
_SKEW_WARNING_S, _SKEW_ERROR_S = 5.0, 300.0  # beyond the latter object stores and schedulers refuse a machine, too
_MIB = 2**20
_SHM_LEAST, _SHM_WANTED = 16 * _MIB, 256 * _MIB
_MESSAGE = 4 * _MIB


@dataclass(frozen=True)
class Place:
    """A file system that a rank writes to."""

    key: str
    path: str
    free: int  # bytes
    needed: int  # with less the run cannot go on
    wanted: int  # with less it may end later
    remedy: str


@dataclass(frozen=True)
class Facts:
    """What one rank says of itself."""

    rank: int
    host: str
    same: Mapping[str, Mapping[str, str]]  # kind (of REMEDIES) -> key -> value
    places: tuple[Place, ...]
    clock: float  # of all ranks at the same moment


@dataclass(frozen=True)
class Problem:
    fatal: bool
    text: str


@dataclass(frozen=True)
class Started:
    """What the check found, for the log and for the record of starts."""

    hosts: tuple[str, ...]  # of every rank
    source_sha256: str
    seconds: float
    skew_s: float
    all_reduce_gb_per_s: float | None  # on the bus: comparable over numbers of ranks; None: one process
    all_reduce_latency_us: float | None
    warnings: tuple[str, ...]


def check_start(
    config: RunConfig,
    data: DataMixture,
    spec: ModelSpec,
    base: StoredModel | None,
    directory: Path,
    world: World,
    device: torch.device,
) -> Started:
    """Compare all ranks and measure their collectives. All ranks call this together; UserError on all of them."""
    began = time.perf_counter()
    if world.is_main:
        atomic_write_text(directory / _MARK, uuid.uuid4().hex)
    barrier()
    facts = collect(config, data, spec, base, directory, world, device)
    barrier()
    facts = replace(facts, clock=time.time())
    first = broadcast(facts)
    found = all_gather_object((facts.host, facts.clock - first.clock, compare(first, facts)))
    if world.is_main:
        (directory / _MARK).unlink(missing_ok=True)
    warnings = _refuse_fatal([problem for _, _, problems in found for problem in problems])
    speed, latency = _measure_all_reduce(device) if world.size > 1 else (None, None)
    source = hashlib.sha256(repr(sorted(facts.same["source file"].items())).encode()).hexdigest()
    return Started(
        hosts=tuple(host for host, *_ in found),
        source_sha256=source,
        seconds=time.perf_counter() - began,
        skew_s=max(abs(skew) for _, skew, _ in found),
        all_reduce_gb_per_s=speed,
        all_reduce_latency_us=latency,
        warnings=warnings,
    )


def collect(
    config: RunConfig,
    data: DataMixture,
    spec: ModelSpec,
    base: StoredModel | None,
    directory: Path,
    world: World,
    device: torch.device,
) -> Facts:
    """What this rank has. The clock is to be set later, by all ranks at once."""
    same = {
        "version of": _versions(),
        "source file": source_hashes(Path(__file__).parents[1]),
        "key": _configuration(config),
        "SHA-256 of": _inputs(data, base),
        "mark in": {"run_dir": _read_mark(directory)},
        "model of": {device.type: _device_name(device)},
    }
    places = [*_run_places(config, spec, directory)] if world.is_main else []
    if world.local_rank == 0:
        places += [*_machine_places(config, data)]
    return Facts(world.rank, socket.gethostname(), same, tuple(places), 0.0)


def compare(first: Facts, own: Facts) -> list[Problem]:
    """What is wrong with a rank, seen from rank 0."""
    return [*_differences(first, own), *_skew(first, own), *_shortages(own)]


def _differences(first: Facts, own: Facts) -> Iterator[Problem]:
    for kind, remedy in REMEDIES.items():
        theirs, ours = first.same.get(kind, {}), own.same.get(kind, {})
        for key in {**theirs, **ours}:
            here, there = ours.get(key, "missing"), theirs.get(key, "missing")
            if here != there:
                yield Problem(
                    kind not in _SUSPICIOUS,
                    f"rank {own.rank} on {own.host}: {kind} {key} is {_short(here)}, but {_short(there)} on rank "
                    f"{first.rank} on {first.host}{'; ' if remedy else ''}{remedy}",
                )


def _skew(first: Facts, own: Facts) -> Iterator[Problem]:
    skew = own.clock - first.clock
    if abs(skew) > _SKEW_WARNING_S:
        yield Problem(
            abs(skew) > _SKEW_ERROR_S,
            f"rank {own.rank} on {own.host}: its clock shows {own.clock:.1f}, but {first.clock:.1f} on rank "
            f"{first.rank} on {first.host} ({skew:+.1f} s); have both synchronised",
        )


def _shortages(own: Facts) -> Iterator[Problem]:
    for place in own.places:
        if place.free < max(place.needed, place.wanted):
            fatal = place.free < place.needed
            least = place.needed if fatal else place.wanted
            yield Problem(
                fatal,
                f"rank {own.rank} on {own.host}: {place.key}={place.path} has {_size(place.free)} free, "
                f"{'at least' if fatal else 'better'} {_size(least)}; {place.remedy}",
            )


def _refuse_fatal(problems: list[Problem]) -> tuple[str, ...]:
    """The warnings among them; UserError when there is worse."""
    fatal = [problem.text for problem in problems if problem.fatal]
    if fatal:
        raise UserError(fatal[0] + (f" (and {len(fatal) - 1} more such)" if len(fatal) > 1 else ""))
    return tuple(problem.text for problem in problems)


def log_start(started: Started) -> None:
    """What the check found, into the run's log."""
    for text in started.warnings:
        logger.warning("%s", text)
    if started.all_reduce_gb_per_s is None:
        return
    logger.info(
        "%d ranks on %d machine(s) agree (%.2f s): all_reduce of %d MiB %.2f GB/s, of one number %.0f us; clocks "
        "within %.3f s",
        len(started.hosts),
        len(set(started.hosts)),
        started.seconds,
        _MESSAGE // _MIB,
        started.all_reduce_gb_per_s,
        started.all_reduce_latency_us,
        started.skew_s,
    )


def source_hashes(package: Path) -> dict[str, str]:
    """SHA-256 of every source file. Unlike a git revision it also sees what was changed, or was never in git."""
    return {
        str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*.py"))
    }


def _versions() -> dict[str, str]:
    found = {name: str(installed_version(name)) for name in (*PACKAGES, "deepspeed", "flash-attn")}
    return {"python": platform.python_version(), **found, "torch": torch.__version__, "CUDA": str(torch.version.cuda)}


def _configuration(config: RunConfig) -> dict[str, str]:
    """All keys but the places that may have another name on every machine; what lies there is compared."""
    flat = flatten(asdict(config))
    local = {"run_dir", "data.path", *(f"data.streams.{name}.path" for name in config.data.streams)}
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


def _run_places(config: RunConfig, spec: ModelSpec, directory: Path) -> Iterator[Place]:
    """A save needs room for one checkpoint beside those that are kept."""
    copies = 3 + (config.ema.decay > 0)  # weights, two moments, averages, all in float32
    size = 4 * copies * count_parameters(spec.build())
    lacking = config.train.keep_last + 1 - len(list_checkpoints(directory / "checkpoints"))
    remedy = "free space, lower train.keep_last, or choose another run_dir"
    yield from _place("run_dir", directory, size, size * max(1, lacking), remedy)


def _machine_places(config: RunConfig, data: DataMixture) -> Iterator[Place]:
    for source in data.streams:
        if remote_of(source.root) is not None:
            needed, wanted = _cache_needs(config, source)
            remedy = "free space, set data.cache_limit, or put the cache on another disk"
            yield from _place(source.key, source.root, needed, wanted, remedy)
    remedy = "give the container more (docker run --shm-size=1g)"
    yield from _place("shared memory", Path("/dev/shm"), _SHM_LEAST, _SHM_WANTED, remedy)


def _cache_needs(config: RunConfig, source: DataStream) -> tuple[int, int]:
    """Bytes of the largest shard that is still to come, and of all that will come."""
    files = [file for split in source.manifest.splits.values() for file in split.files]
    missing = [file.bytes for file in files if not (source.root / file.file).is_file()]
    wanted = sum(missing)
    if config.data.cache_limit is not None:
        wanted = min(wanted, bytes_to_int(config.data.cache_limit))
    return max(missing, default=0), wanted


def _place(key: str, path: Path, needed: int, wanted: int, remedy: str) -> Iterator[Place]:
    """Nothing where the system does not say how large the place is, as some network file systems do not."""
    if not path.exists():
        return
    usage = shutil.disk_usage(path)
    if usage.total > 0:
        yield Place(key, str(path), usage.free, needed, wanted, remedy)


def _measure_all_reduce(device: torch.device) -> tuple[float, float]:
    """GB/s on the bus for a message of some size, and microseconds for one number."""
    ranks = dist.get_world_size()
    seconds, latency = _all_reduce_seconds(_MESSAGE // 4, 5, device), _all_reduce_seconds(1, 20, device)
    return 2 * (ranks - 1) / ranks * _MESSAGE / seconds / 1e9, 1e6 * latency


def _all_reduce_seconds(elements: int, repeats: int, device: torch.device) -> float:
    tensor = torch.zeros(elements, device=device)
    dist.all_reduce(tensor)  # the first one connects
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
