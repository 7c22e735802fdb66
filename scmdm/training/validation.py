"""Held-out NELBO of a model during training or evaluation.

Legend: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from scmdm.config.run import RunConfig
from scmdm.config.training import TrainConfig
from scmdm.data.loader import read_columns, spread_rows
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture
from scmdm.data.shard_index import DOCUMENTS, GIVEN, GIVEN_MASK, LABEL
from scmdm.diffusion.likelihood import Nelbo, estimate_nelbo
from scmdm.diffusion.packing import document_starts
from scmdm.diffusion.state import Sequences
from scmdm.distributed.engine import Engine
from scmdm.models.model_files import ModelSpec
from scmdm.training.padding import own_lengths, used_lengths

_BATCH = 256
T = TypeVar("T")


def to_device(
    batch: dict[str, Tensor],
    manifest: Manifest,
    device: torch.device,
    *,
    labels: bool = False,
    lengths_B: Tensor | None = None,
) -> Sequences:
    """Convert a loader's batch of (B, L) tokens to `Sequences` on a device, with labels if `labels` is set.

    Positions are neither valid nor masked if they begin a document and `bos_policy` is "given", if they belong to the
    prefix whose length is in the column `given`, or are marked in the column `given_mask`, or if they follow the
    sample's own length in `lengths_B`. Padding is not valid if `pad_policy` is "ignore" or "masked"; it is then never
    masked, or masked like any token.
    """
    tokens = batch["tokens"].to(device, non_blocking=True)
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    index, documents, given, given_mask, label = (
        batch[name].to(device, non_blocking=True) if name in batch else None
        for name in ("index", DOCUMENTS, GIVEN, GIVEN_MASK, LABEL)
    )
    assert index is not None
    assert label is not None or not labels
    if manifest.bos_policy == "given":
        maskable[:, 0] = False
    if given is not None:
        maskable &= torch.arange(tokens.shape[1], device=device) >= given[:, None]
    if given_mask is not None:
        maskable &= given_mask == 0
    if lengths_B is not None:
        maskable &= torch.arange(tokens.shape[1], device=device) < lengths_B.to(device)[:, None]
    if documents is not None and manifest.bos_policy == "given":
        maskable &= ~document_starts(documents)
    if manifest.counts_padding:
        return Sequences(tokens, maskable, index, documents, label if labels else None, lengths_B)
    valid = maskable & (torch.arange(tokens.shape[1], device=device) < used_lengths(tokens, manifest)[:, None])
    masked_too = maskable if manifest.pad_policy == "masked" else None
    return Sequences(tokens, valid, index, documents, label if labels else None, lengths_B, masked_too)


def validation_batches(
    root: Path,
    split: str,
    manifest: Manifest,
    device: torch.device,
    samples: int,
    first_id: int = 0,
    *,
    labels: bool = False,
    padding: TrainConfig | None = None,
) -> Iterator[Sequences]:
    """Yield `samples` sequences spread evenly over a split; their ids are `first_id` plus their index in the split.

    `padding` has the rule for the lengths of the sequences; None: that of the data.
    """
    rows = spread_rows(manifest.split(split, root).samples, samples)
    columns = {name: torch.from_numpy(found) for name, found in read_columns(root, split, rows).items()}
    columns["index"] = torch.tensor(rows) + first_id
    lengths_N = own_lengths(columns["tokens"], manifest, padding) if padding is not None else None
    for start in range(0, len(rows), _BATCH):
        part = slice(start, start + _BATCH)
        batch = {name: found[part] for name, found in columns.items()}
        lengths_B = None if lengths_N is None else lengths_N[part]
        yield to_device(batch, manifest, device, labels=labels, lengths_B=lengths_B).cropped()


def mixed_validation_batches(
    data: DataMixture,
    split: str,
    device: torch.device,
    samples: int,
    *,
    labels: bool = False,
    padding: TrainConfig | None = None,
) -> Iterator[Sequences]:
    """Yield `validation_batches` of every validated stream in turn, each with its proportion of `samples`."""
    first_id = 0
    for source, share in data.validation_shares(samples):
        yield from validation_batches(
            source.root, split, source.manifest, device, share, first_id, labels=labels, padding=padding
        )
        first_id += source.manifest.split(split, source.root).samples


def validation_nelbo(
    engine: Engine,
    config: RunConfig,
    spec: ModelSpec,
    data: DataMixture,
    *,
    condition: bool,
    on_batch: Callable[[str], None],
) -> Nelbo:
    """Estimate the NELBO of the engine's weights on the validation split, with the same times and masks at every call.

    `on_batch("validation")` is called before and after every batch.
    """
    samples = config.train.validation_samples
    split, labels = config.data.validation_split, spec.model.labels
    batches = mixed_validation_batches(data, split, engine.device, samples, labels=labels, padding=config.train)
    engine.model.eval()
    with engine.compute():
        return estimate_nelbo(
            engine.denoiser,
            _with_callback(batches, on_batch),
            spec.schedule,
            mask_id=spec.mask_id,
            seed=0,
            t_min=config.diffusion.t_min,
            condition=condition,
            passes=config.self_conditioning.passes,
        )


def _with_callback(batches: Iterator[T], on_batch: Callable[[str], None]) -> Iterator[T]:
    on_batch("validation")
    for batch in batches:
        yield batch
        on_batch("validation")
