"""`scmdm import` and `scmdm export`."""

from __future__ import annotations

from pathlib import Path

from scmdm.config.conversion import ExportConfig, ImportConfig
from scmdm.convert.exporter import export_model
from scmdm.convert.importer import import_model
from scmdm.system.terminal import say


def run_import(source: Path, out: Path, config: ImportConfig) -> None:
    """Convert the published model at `source` into the new directory `out`."""
    made = import_model(source, out, config)
    for note in made.notes:
        say(note)
    say(f"wrote {out}: {made.layout}, {made.parameters:,} parameters, samples of {made.spec.length} tokens")


def run_export(model: Path, out: Path, config: ExportConfig) -> None:
    """Write a model into the new directory `out`."""
    say(f"wrote {export_model(model, out, config)}")
