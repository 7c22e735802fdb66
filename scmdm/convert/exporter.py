"""`scmdm export`: write a trained model as a model directory, or in a layout that other programs read.

Published layouts have no place for the conditioner. It is written into the subdirectory `scmdm/`, from which
`scmdm import` restores the adapted model. LoRA adapters are merged, except with `format=peft`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from scmdm.checkpoint.model_verification import Verification
from scmdm.checkpoint.reader import find_model
from scmdm.checkpoint.seal import seal
from scmdm.config.conversion import ExportConfig
from scmdm.config.layouts import LAYOUTS
from scmdm.config.stored import read_stored_config
from scmdm.convert.importer import CONDITIONER_FILE, SUBDIRECTORY
from scmdm.convert.layout import PublishedLayout, TokenIds, check_writable
from scmdm.convert.model_card import model_card
from scmdm.convert.published_files import CONFIG_FILE
from scmdm.convert.regrouped_tensors import ungrouped
from scmdm.data.tokenizers import HuggingFaceTokenizer
from scmdm.errors import UserError
from scmdm.models.conditioner import CONDITIONER_PREFIX
from scmdm.models.lora import adapted_modules, is_added, merged
from scmdm.models.model_files import (
    WEIGHTS_FILE,
    ModelSpec,
    StoredModel,
    iterate_weights,
    open_model,
    tokenizer_file,
    write_model_files,
)
from scmdm.models.safetensors_headers import SINGLE_FILE
from scmdm.models.safetensors_shards import write_shards
from scmdm.system.files import atomic_directory, atomic_write_text

HUB_TYPE, HUB_CLASS = "scmdm", "MaskedDiffusion"


def export_model(path: Path, out: Path, config: ExportConfig) -> Path:
    """Write the model of a run, a checkpoint or an export into the new directory `out`, with a model card.

    Raises UserError when the layout `config.format` cannot represent the model.
    """
    stored = open_model(find_model(path, Verification("share", weights=config.weights)))
    layout: PublishedLayout | None = LAYOUTS.load(config.format) if config.format in LAYOUTS.names else None
    if layout is not None:
        check_writable(layout, stored.spec)
    if config.format == "peft" and not stored.spec.model.lora_rank:
        raise UserError(
            f"format=peft: {path} has no adapters; give a run with model.lora_rank above 0, or another format"
        )
    if config.format == "peft" and stored.spec.diffusion.block_length is not None:
        raise UserError(
            f"format=peft is not possible for {path} with diffusion.block_length={stored.spec.diffusion.block_length}, "
            "for which adapter_config.json has no place; use another format"
        )
    if out.exists():
        raise UserError(f"{out} exists; export into a new directory, or remove it first")
    limit = int(config.shard_gb * 1e9)
    with atomic_directory(out) as temporary:
        if config.format == "scmdm":
            _write_description(stored, temporary)
            written = write_shards(temporary / WEIGHTS_FILE, _weights(stored, config), limit)
        elif config.format == "peft":
            _write_adapters(stored, temporary, config)
        elif config.format == "hub":
            _write_for_hub(stored, temporary, config, limit)
        else:
            assert layout is not None
            _write_published(stored, layout, temporary, config, limit)
        described = stored if config.format == "peft" else replace(stored, spec=_merged_spec(stored.spec))
        atomic_write_text(temporary / "README.md", model_card(described, config, layout))
        if config.format == "scmdm":
            seal(temporary, written)
    return out


def _merged_spec(spec: ModelSpec) -> ModelSpec:
    return replace(spec, model=replace(spec.model, lora_rank=0))


def _write_description(stored: StoredModel, to: Path) -> None:
    write_model_files(to, _merged_spec(stored.spec), stored.manifest, tokenizer_file(stored.path, stored.manifest))


def _write_adapters(stored: StoredModel, to: Path, config: ExportConfig) -> None:
    """Write adapters and conditioner in the format of `peft`."""
    model = stored.spec.model
    weights = _cast(iterate_weights(stored.path, weights=config.weights), config)
    added = {name: value for name, value in weights if is_added(name)}
    if model.experts and any(value.dim() > 2 for value in added.values()):
        raise UserError(
            f"format=peft is not possible for {stored.path}, whose experts have adapters: peft has none for stacked "
            "matrices; use another format, or adapt with model.lora_targets=[attn_q,attn_k,attn_v,attn_out]"
        )
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": Path(read_stored_config(stored.path).need("base", str)).name,
        "inference_mode": True,
        "r": model.lora_rank,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": adapted_modules(added),
        "modules_to_save": ["conditioner"] if model.self_conditioned else None,
    }
    atomic_write_text(to / "adapter_config.json", json.dumps(content, indent=2) + "\n")
    named = ((f"base_model.model.{name}", value) for name, value in added.items())
    write_shards(to / "adapter_model.safetensors", named, limit=2**63)


def _write_for_hub(stored: StoredModel, to: Path, config: ExportConfig, limit: int) -> None:
    """Write the files of `MaskedDiffusion.save_pretrained` without loading the whole model."""
    described = {"model_type": HUB_TYPE, "architectures": [HUB_CLASS], "spec": asdict(_merged_spec(stored.spec))}
    atomic_write_text(to / CONFIG_FILE, json.dumps(described, indent=2) + "\n")
    _write_tokenizer(stored, to)
    named = ((f"network.{name}", value) for name, value in _weights(stored, config))
    write_shards(to / SINGLE_FILE, named, limit, index=True)


def _write_tokenizer(stored: StoredModel, to: Path) -> None:
    if isinstance(stored.tokenizer, HuggingFaceTokenizer):
        stored.tokenizer.write_transformers_files(to, stored.spec.length)


def _write_published(stored: StoredModel, layout: PublishedLayout, to: Path, config: ExportConfig, limit: int) -> None:
    spec, subdirectory = stored.spec, to / SUBDIRECTORY
    subdirectory.mkdir()
    _write_description(stored, subdirectory)
    tokenizer = stored.tokenizer
    ids = TokenIds(tokenizer.bos_id, tokenizer.end_ids, tokenizer.pad_id, tokenizer.mask_id)
    described = layout.describe(spec, ids)
    atomic_write_text(to / CONFIG_FILE, json.dumps(described, indent=2) + "\n")
    _write_tokenizer(stored, to)
    write_shards(to / SINGLE_FILE, _published_weights(stored, layout, config), limit, index=True)
    if spec.model.self_conditioned:
        own = ((name, value) for name, value in _weights(stored, config) if name.startswith(CONDITIONER_PREFIX))
        write_shards(subdirectory / CONDITIONER_FILE, own, limit=2**63)


def _published_weights(
    stored: StoredModel, layout: PublishedLayout, config: ExportConfig
) -> Iterator[tuple[str, Tensor]]:
    own = (item for item in _weights(stored, config) if not item[0].startswith(CONDITIONER_PREFIX))
    named = ((layout.published_name(name), value) for name, value in own)
    yield from ungrouped(named) if layout.of_experts else named
    yield from layout.derived_tensors(stored.spec.model)


def _weights(stored: StoredModel, config: ExportConfig) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the weights to export, with merged adapters."""
    return _cast(merged(iterate_weights(stored.path, weights=config.weights), stored.spec.model), config)


def _cast(weights: Iterable[tuple[str, Tensor]], config: ExportConfig) -> Iterator[tuple[str, Tensor]]:
    dtype: torch.dtype | None = None if config.dtype == "stored" else getattr(torch, config.dtype)
    for name, value in weights:
        yield name, value if dtype is None else value.to(dtype)
