"""Held-out NELBO of a model during training or evaluation.

Legend: B batch, L length, N sequences of a share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from scmdm.config.run import RunConfig
from scmdm.config.training import TrainConfig
from scmdm.data.loader import read_columns, spread_rows
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture
from scmdm.data.shard_index import COLUMN, DOCUMENTS, GIVEN, GIVEN_MASK, LABEL
from scmdm.diffusion.likelihood import Nelbo, nelbo_of, nelbo_terms
from scmdm.diffusion.packing import document_starts
from scmdm.diffusion.state import Sequences
from scmdm.distributed.engine import Engine
from scmdm.models.model_files import ModelSpec
from scmdm.training.padding import own_lengths, used_lengths

_STRATUM = 256  # sequences; fixed, so that the estimates of a model depend on its weights alone
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


@dataclass(frozen=True)
class ValidationRows:
    """Rows of a split, ascending."""

    root: Path
    manifest: Manifest
    rows: Sequence[int]
    first_id: int  # id of the split's first sample


@dataclass(frozen=True)
class ValidationSet:
    """Sequences of a likelihood estimate, in an order that every rank knows before it reads its share.

    The ids of the sequences are those of their splits, numbered across the validated data sets. `padding`
    has the rule for the lengths of the sequences; None: that of the data.
    """

    split: str
    streams: tuple[ValidationRows, ...]
    padding: TrainConfig | None = None

    @classmethod
    def at(
        cls, root: Path, split: str, manifest: Manifest, samples: int, *, padding: TrainConfig | None = None
    ) -> ValidationSet:
        """Take `samples` sequences, spread evenly over a split of one data set."""
        rows = spread_rows(_size(root, split, manifest), samples)
        return cls(split, (ValidationRows(root, manifest, rows, 0),), padding)

    @classmethod
    def of(cls, data: DataMixture, split: str, samples: int, *, padding: TrainConfig | None = None) -> ValidationSet:
        """Take each validated stream's proportion of `samples` sequences."""
        streams: list[ValidationRows] = []
        first_id = 0
        for source, share in data.validation_shares(samples):
            size = _size(source.root, split, source.manifest)
            streams.append(ValidationRows(source.root, source.manifest, spread_rows(size, share), first_id))
            first_id += size
        return cls(split, tuple(streams), padding)

    def __len__(self) -> int:
        return sum(len(stream.rows) for stream in self.streams)

    def strata(self) -> list[Tensor]:
        """Return the ids of the groups of sequences over which times are stratified; they depend on the set alone."""
        ids = (torch.tensor(stream.rows) + stream.first_id for stream in self.streams)
        return [stratum for ids_N in ids for stratum in ids_N.split(_STRATUM)]

    def share(self, parts: int) -> int:
        """Return the number of sequences of each of `parts` shares; beyond the end of the set the last one repeats."""
        return -(-len(self) // parts)

    def batches(
        self,
        device: torch.device,
        *,
        size: int,
        part: int = 0,
        parts: int = 1,
        labels: bool = False,
        longest_of_all: Callable[[int], int] = int,
    ) -> Iterator[Sequences]:
        """Yield share number `part` of `parts`, `size` sequences at a time.

        Every share has the same number of batches and sequences, because sharded ranks run the same forward passes
        (`share`). `longest_of_all` returns the largest of all ranks' values.
        """
        share = self.share(parts)
        wanted = [min(row, len(self) - 1) for row in range(part * share, (part + 1) * share)]
        yield from self.batches_of(wanted, device, size=size, labels=labels, longest_of_all=longest_of_all)

    def batches_of(
        self,
        numbers: Sequence[int],
        device: torch.device,
        *,
        size: int,
        labels: bool = False,
        longest_of_all: Callable[[int], int] = int,
    ) -> Iterator[Sequences]:
        """Yield the sequences `numbers` of the set, `size` at a time; the other arguments are those of `batches`."""
        columns: dict[str, list[Tensor]] = defaultdict(list)
        lengths: list[Tensor] = []
        first = 0
        for stream in self.streams:
            own = [stream.rows[row - first] for row in numbers if first <= row < first + len(stream.rows)]
            first += len(stream.rows)
            found = _columns(stream, self.split, own, labels=labels) if own else {}
            tokens_NL = found.get(COLUMN, torch.zeros(0, stream.manifest.length, dtype=torch.int64))
            if self.padding is not None:
                own_N = own_lengths(tokens_NL, stream.manifest, self.padding, longest_of_all)
                lengths += [] if own_N is None else [own_N]
            for name, values in found.items():
                columns[name].append(values)
        whole = {name: torch.cat(values) for name, values in columns.items()}
        lengths_N = torch.cat(lengths) if lengths else None
        for start in range(0, len(numbers), size):
            rows = slice(start, start + size)
            batch = {name: values[rows] for name, values in whole.items()}
            lengths_B = None if lengths_N is None else lengths_N[rows]
            manifest = self.streams[0].manifest
            yield to_device(batch, manifest, device, labels=labels, lengths_B=lengths_B).cropped()


def _size(root: Path, split: str, manifest: Manifest) -> int:
    return manifest.split(split, root).samples


def _columns(stream: ValidationRows, split: str, rows: Sequence[int], *, labels: bool) -> dict[str, Tensor]:
    """Read rows of a split as a loader does. Labels that are not used are left out: not all streams may have them."""
    found = read_columns(stream.root, split, rows)
    columns = {name: torch.from_numpy(values) for name, values in found.items() if labels or name != LABEL}
    return {**columns, "index": torch.tensor(rows) + stream.first_id}


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

    Each rank evaluates its share, `train.micro_batch_size` sequences at a time. One collective gathers the terms of all
    sequences; the result depends on neither the number of ranks nor the size of the batches. All ranks call this
    together. `on_batch("validation")` is called before and after every batch.
    """
    train = config.train
    chosen = ValidationSet.of(data, config.data.validation_split, train.validation_samples, padding=train)
    batches = chosen.batches(
        engine.device,
        size=train.micro_batch_size,
        part=engine.data_rank,
        parts=engine.data_size,
        labels=spec.model.labels,
        longest_of_all=longest_of_all(engine),
    )
    engine.model.eval()
    with engine.compute():
        terms_N2 = nelbo_terms(
            engine.denoiser,
            _with_callback(batches, on_batch),
            spec.schedule,
            mask_id=spec.mask_id,
            seed=0,
            t_min=config.diffusion.t_min,
            strata=chosen.strata(),
            condition=condition,
            passes=config.self_conditioning.passes,
            block_length=spec.diffusion.block_length,
        )
    gathered = engine.all_gather(terms_N2.flatten().to(engine.device)).cpu()
    return nelbo_of(gathered.view(-1, 2)[: len(chosen)])


def longest_of_all(engine: Engine) -> Callable[[int], int]:
    """Return a function that returns the largest of the values that all ranks pass."""
    return lambda value: int(engine.all_gather(torch.tensor([value], device=engine.device)).max())


def _with_callback(batches: Iterator[T], on_batch: Callable[[str], None]) -> Iterator[T]:
    on_batch("validation")
    for batch in batches:
        yield batch
        on_batch("validation")
