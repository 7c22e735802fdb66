"""Draw docs/explanation/architecture.svg: the layers of the import contract in pyproject.toml.

python docs/architecture.py
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs/explanation/architecture.svg"
WIDTH, ROW, GAP, MARGIN = 860, 30, 6, 16
COLUMNS = 32  # letters that fit into the box of `diffusion`
ROLES = {
    "cli": "commands",
    "doctor": "what this machine can run",
    "integrations": "transformers, lm-eval, demo",
    "study": "base against adaptations, end to end",
    "planner": "memory, traffic and time of a run",
    "launch": "SLURM and local jobs",
    "evaluation": "likelihood, comparison, statistics, report",
    "sampling": "templates, batches, ranks, writing",
    "convert": "published model layouts",
    "training": "step, trainer, optimizer, validation",
    "domains": "metrics and figures by kind of data",
    "data_prep": "sources: one module per corpus",
    "runtime": "run lock, preflight, watchdog, status",
    "checkpoint": "complete or absent, hashed, no pickles",
    "observability": "metrics, clock, progress, environment",
    "distributed": "engines: single, FSDP2, DeepSpeed",
    "models": "denoisers, attention, conditioner, LoRA",
    "ops": "output head, top-k, CUDA graphs",
    "data": "tokenizers, preparation, shards, loader",
    "config": "keys with their rules, registries, loading",
    "system": "files, processes, signals",
    "errors": "UserError: one line that names the remedy",
    "torch_private": "private torch API, in one place",
    "diffusion": "the mathematics: imports torch alone",
}


def layers() -> list[list[str]]:
    """Layers of the contract from top to bottom, each a list of packages that do not import each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[package.strip().removeprefix("scmdm.") for package in layer.split("|")] for layer in found]


def drawing() -> str:
    """The diagram as SVG."""
    rows = layers()
    height = 2 * MARGIN + len(rows) * (ROW + GAP) + 34
    side = 250
    left = WIDTH - side - 3 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 8}" fill="#444">A package imports only from the packages below it.</text>',
    ]
    top = MARGIN + 20
    for number, row in enumerate(rows):
        y = top + number * (ROW + GAP)
        width = (left - GAP * (len(row) - 1)) / len(row)
        for column, package in enumerate(row):
            parts += _box(MARGIN + column * (width + GAP), y, width, ROW, package, len(row) == 1)
    lowest = next(number for number, row in enumerate(rows) if "config" in row)  # of those that import it
    x = left + 2 * MARGIN
    y = top
    tall = (lowest + 1) * (ROW + GAP) - GAP
    parts += [
        f'<rect x="{x}" y="{y}" width="{side}" height="{tall}" rx="4" fill="#fff4e0" stroke="#d08a1d"/>',
        f'<text x="{x + 12}" y="{y + 24}" font-weight="bold">diffusion</text>',
    ]
    modules = sorted(path.stem for path in (ROOT / "scmdm/diffusion").glob("[!_]*.py"))
    texts = (ROLES["diffusion"], ", ".join(modules), "Packages beside may import it.")
    lines = [line for text in texts for line in (*wrap(text, COLUMNS), "")]
    parts += [f'<text x="{x + 12}" y="{y + 48 + 18 * i}">{escape(line)}</text>' for i, line in enumerate(lines)]
    return "\n".join([*parts, "</svg>", ""])


def _box(x: float, y: float, width: float, height: float, package: str, with_role: bool) -> list[str]:
    text = f'<tspan font-weight="bold">{escape(package)}</tspan>'
    role = ROLES[package]
    if with_role:
        text += f'<tspan x="{x + 130:g}" fill="#444">{escape(role)}</tspan>'
    else:
        text += f'<tspan dx="10" fill="#444" font-size="11">{escape(role)}</tspan>'
    return [
        f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{height}" rx="4" fill="#e8eef7" stroke="#5b7db1"/>',
        f'<text x="{x + 10:g}" y="{y + 20}">{text}</text>',
    ]


if __name__ == "__main__":
    OUT.write_text(drawing())
