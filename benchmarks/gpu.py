"""`python -m benchmarks gpu`: everything that is worth knowing of one GPU, in at most eight minutes.

Each part runs in a process of its own with a limit of time: a part that takes too long is cut, a part that fails is
recorded with its error, and the rest goes on. `--device cpu --tiny` rehearses all of it on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_part import PARTS
from benchmarks.timing import RESULTS
from scmdm.observability.environment import git_revision
from scmdm.system.files import atomic_write_text

_LIMIT_S = 460  # of all parts together; the rest of eight minutes is for the start
_PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "numpy",
    "transformers",
    "deepspeed",
    "mosaicml-streaming",
    "liger-kernel",
)
_ERROR_LINES = 30
_NOTES = Path("docs/lab/gpu")


def main(arguments: list[str]) -> int:
    """Run all parts, and write a dated JSON file and a Markdown page; returns 1 if a part failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"PART: {unknown[0]!r} is not one of {', '.join(map(repr, PARTS))}")
    gpu = options.device != "cpu" and torch.cuda.is_available()
    if not gpu and options.device != "cpu":
        sys.exit("no CUDA device; rehearse with `--device cpu --tiny`")
    out = options.out or (RESULTS / "gpu" if options.tiny else _NOTES)
    names = options.parts or list(PARTS)
    started = time.monotonic()
    record = {**_environment(gpu), "tiny": options.tiny, "parts": {}}
    for name in names:
        left = _LIMIT_S - (time.monotonic() - started)
        record["parts"][name] = found = run_part(name, min(PARTS[name][1], left), tiny=options.tiny, gpu=gpu)
        print(f"{name}: {found['status']}, {found['seconds']:.1f} s of {found['limit_s']:.0f}", flush=True)
        _write(out, record)  # what there is, in case the machine is taken away
    print(f"wrote {_write(out, record)}")
    return int(any(part["status"] == "failed" for part in record["parts"].values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a rehearsal")
    parser.add_argument(
        "--out", type=Path, help=f"directory of the results (default: {_NOTES}; a rehearsal: {RESULTS})"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"parts to run: {', '.join(PARTS)}")
    return parser


def run_part(name: str, limit_s: float, *, tiny: bool, gpu: bool) -> dict[str, Any]:
    """Run one part in a new process group, which is killed at the limit; returns its record."""
    environment = {**os.environ, **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    with tempfile.TemporaryDirectory() as folder:
        file, started = Path(folder) / "result.json", time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu_part", name, str(file), *(["--tiny"] if tiny else [])]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        found: dict[str, Any] = {}
        try:
            output, _ = process.communicate(timeout=max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            _kill_group(process)
            output, _ = process.communicate()
            found = {"status": "cut", "reason": f"not finished within {limit_s:.0f} s"}
        except BaseException:  # Ctrl-C does not reach the group
            _kill_group(process)
            process.wait()
            raise
        if file.exists():
            found = json.loads(file.read_text())
        if not found:
            found = {"status": "failed", "error": f"exit status {process.returncode}"}
        if found["status"] != "ok":
            found["output"] = output.splitlines()[-_ERROR_LINES:]
        return {**found, "seconds": time.monotonic() - started, "limit_s": limit_s}


def _kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(gpu: bool) -> dict[str, Any]:
    versions = {found.name: found.version for found in distributions() if found.name in _PACKAGES}
    device = torch.cuda.get_device_properties(0) if gpu else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "revision": git_revision(Path(__file__).parent),
        "gpu": device.name if device is not None else None,
        "gpu_memory_gib": device.total_memory / 2**30 if device is not None else None,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def _write(out: Path, record: dict[str, Any]) -> Path:
    """Write JSON and Markdown; their name has the time of the start and the device."""
    device = (record["gpu"] or "cpu").lower().replace(" ", "-").replace("/", "-")
    out.mkdir(parents=True, exist_ok=True)
    started = record["date"].replace(" ", "-").replace(":", "")
    path = out / f"{started}-{device}.json"
    atomic_write_text(path, json.dumps(record, indent=1) + "\n")
    atomic_write_text(path.with_suffix(".md"), as_markdown(record))
    return path


def as_markdown(record: dict[str, Any]) -> str:
    """Render a record as a page: the machine, what became of each part, and the main figures."""
    gpu = record["gpu"] or "CPU"
    packages = ", ".join(f"{name} {version}" for name, version in sorted(record["packages"].items()))
    lines = [
        f"# {gpu}, {record['date'][:10]}",
        "",
        f"`python -m benchmarks gpu{' --tiny' if record['tiny'] else ''}`, {record['date']} UTC, revision "
        f"{json.dumps(record['revision'])}; driver {record['driver']}, CUDA {record['cuda']}, Python "
        f"{record['python']}, {packages}. Every round and every setting is in the JSON file beside this page.",
        "",
        "| part | result | s | figures |",
        "|---|---|---|---|",
    ]
    for name, part in record["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {_figures(part)} |")
    failed = {name: part for name, part in record["parts"].items() if part["status"] in ("failed", "cut")}
    for name, part in failed.items():
        lines += ["", f"## {name}: {part['status']}", "", "```text", *part["output"], "```"]
    return "\n".join(lines) + "\n"


def _figures(part: dict[str, Any]) -> str:
    if part["status"] != "ok":
        return str(part.get("reason") or part.get("error"))
    result, found = part["result"], []
    for name in ("vanilla", "adaptation"):
        if isinstance(step := result.get(name), dict):
            share = f", MFU {step['mfu']:.3f}" if step["mfu"] is not None else ""
            found.append(f"{name} {step['tokens_per_s']:,.0f} tokens/s{share}, {step['peak_gib']:.1f} GiB")
    if "adaptation over vanilla" in result:
        found.append(f"ratio {result['adaptation over vanilla']:.3f}")
    found += [f"{name} {value:.2f} samples/s" for name, value in result.get("samples_per_s", {}).items()]
    found += result.get("summary", [])[-1:]
    found += [_fastest(title, rounds) for title, rounds in result.items() if title.startswith("attention")]
    return "; ".join(found).replace("|", "/")


def _fastest(title: str, rounds: dict[str, Any]) -> str:
    best = {name: min(timing["wall"]) for name, timing in rounds.items()}
    return f"{title}: " + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in best.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
