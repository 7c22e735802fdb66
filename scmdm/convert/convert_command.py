"""`scmdm import` and `scmdm export`."""

from __future__ import annotations

import argparse


def import_schema() -> type:
    from scmdm.config.conversion import ImportConfig

    return ImportConfig


def export_schema() -> type:
    from scmdm.config.conversion import ExportConfig

    return ExportConfig


def run_import(options: argparse.Namespace) -> None:
    from scmdm.config.loading import load_config
    from scmdm.convert.importer import import_model

    made = import_model(options.source, options.out, load_config(import_schema(), None, options.overrides))
    for note in made.notes:
        print(note)
    print(f"wrote {options.out}: {made.layout}, {made.parameters:,} parameters, samples of {made.spec.length} tokens")


def run_export(options: argparse.Namespace) -> None:
    from scmdm.config.loading import load_config
    from scmdm.convert.exporter import export_model

    made = export_model(options.model, options.out, load_config(export_schema(), None, options.overrides))
    print(f"wrote {made}")
