"""`scmdm export`: a trained model without its run, as a directory of ours or in a layout that other programs read.

A published layout has no place for the conditioner: it lies beside, in `scmdm/`, with all that `scmdm import` needs to
restore the adapted model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from scmdm.config.interchange import ExportConfig
from scmdm.data.tokenizers import HuggingFaceTokenizer
from scmdm.errors import UserError
from scmdm.files import atomic_directory, atomic_write_text
from scmdm.interchange.card import model_card
from scmdm.interchange.importing import BESIDE, CONDITIONER_FILE
from scmdm.interchange.layouts import ALL, Layout, check_writable
from scmdm.interchange.source import CONFIG_FILE, SINGLE_FILE
from scmdm.model.rotary import inverse_frequencies
from scmdm.model.shards import write_shards
from scmdm.model.weights import (
    MODEL_FILE,
    WEIGHTS_FILE,
    StoredModel,
    iterate_weights,
    open_model,
)
from scmdm.training.checkpoint import find_model, seal

_CONDITIONER = "conditioner."


def export_model(path: Path, out: Path, config: ExportConfig) -> Path:
    """Write the model of a run, a checkpoint or an export into the new directory `out`, with a model card.

    Raises UserError when `config.format` has no place for such a model.
    """
    stored = open_model(find_model(path))
    if config.format != "scmdm":
        check_writable(ALL[config.format], stored.spec.model)
    if out.exists():
        raise UserError(f"{out} exists; export into a new directory, or remove it first")
    limit = int(config.shard_gb * 1e9)
    with atomic_directory(out) as temporary:
        if config.format == "scmdm":
            _copy_description(stored, temporary)
            write_shards(temporary / WEIGHTS_FILE, _weights(stored, config), limit)
        else:
            _write_published(stored, ALL[config.format], temporary, config, limit)
        atomic_write_text(temporary / "README.md", model_card(stored, config))
        if config.format == "scmdm":
            seal(temporary)
    return out


def _copy_description(stored: StoredModel, to: Path) -> None:
    for name in (MODEL_FILE, "manifest.json", stored.manifest.tokenizer.file):
        shutil.copyfile(stored.path / name, to / name)


def _write_published(stored: StoredModel, layout: Layout, to: Path, config: ExportConfig, limit: int) -> None:
    spec, beside = stored.spec, to / BESIDE
    beside.mkdir()
    _copy_description(stored, beside)
    described = layout.describe(spec.model, spec.vocab_size, spec.mask_id, spec.length)
    atomic_write_text(to / CONFIG_FILE, json.dumps(described, indent=2) + "\n")
    if isinstance(stored.tokenizer, HuggingFaceTokenizer):
        atomic_write_text(to / "tokenizer.json", json.dumps(stored.tokenizer.pipeline, ensure_ascii=False) + "\n")
    write_shards(to / SINGLE_FILE, _published_weights(stored, layout, config), limit, index=True)
    if spec.model.self_conditioned:
        own = ((name, value) for name, value in _weights(stored, config) if name.startswith(_CONDITIONER))
        write_shards(beside / CONDITIONER_FILE, own, limit=2**63)


def _published_weights(stored: StoredModel, layout: Layout, config: ExportConfig) -> Iterator[tuple[str, Tensor]]:
    for name, value in _weights(stored, config):
        if not name.startswith(_CONDITIONER):
            yield layout.theirs(name), value
    if layout.name == "mdlm":
        yield layout.theirs("rotary_emb.inv_freq"), inverse_frequencies(stored.spec.model.head_width)


def _weights(stored: StoredModel, config: ExportConfig) -> Iterator[tuple[str, Tensor]]:
    dtype: torch.dtype | None = None if config.dtype == "stored" else getattr(torch, config.dtype)
    for name, value in iterate_weights(stored.path, weights=config.weights):
        yield name, value if dtype is None else value.to(dtype)
