"""NELBO of held-out sequences, which the ranks of a job share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scmdm.diffusion.likelihood import Nelbo, nelbo_of, nelbo_terms
from scmdm.diffusion.state import Sequences
from scmdm.distributed.engine import compute_context, resolve_precision
from scmdm.models.model_files import LoadedModel
from scmdm.runtime.divided_work import Columns, ResultParts, compute_divided
from scmdm.runtime.watchdog import report_progress
from scmdm.sampling.batch_size import LARGEST_NELBO_BATCH, even_batch_size, fitting_batch_size


class HeldOut(Protocol):
    """Sequences of a likelihood estimate, in order; a rank reads only its own."""

    def __len__(self) -> int: ...

    def strata(self) -> list[Tensor]:
        """Return the ids of the groups of sequences over which times are stratified."""
        ...

    def batches_of(
        self, numbers: Sequence[int], device: torch.device, *, size: int, labels: bool = False
    ) -> Iterator[Sequences]:
        """Yield the sequences `numbers`, in this order, `size` at a time."""
        ...


@dataclass(frozen=True)
class NelboSettings:
    """Settings of an estimate; those of its noise are the arguments of `nelbo_terms`."""

    draws: int = 1
    passes: int = 1  # that make the estimate of a conditioned NELBO
    seed: int = 0
    t_min: float = 1e-3
    precision: str = "auto"
    batch_size: int | None = None  # sequences at once; None: what fits into memory


def divided_nelbo(
    loaded: LoadedModel,
    held_out: HeldOut,
    settings: NelboSettings,
    *,
    condition: bool,
    parts: ResultParts | None = None,
) -> Nelbo | None:
    """Estimate the NELBO of sequences, divided over the ranks; returns it on rank 0, None on the other ranks.

    It depends on neither the number of ranks nor the batch size, up to the rounding of matrix products. Sequences that
    `parts` holds already are not evaluated again. All ranks call this together.
    """
    spec = loaded.spec
    device = next(loaded.model.parameters()).device
    dtype = resolve_precision(settings.precision, device)
    strata = held_out.strata()
    stratum_of = {number: group for group, ids_N in enumerate(strata) for number in ids_N.tolist()}

    def compute(numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], Columns]]:
        copies = 1 if spec.diffusion.block_length is None else 2  # blocks are evaluated beside a clean copy
        most = fitting_batch_size(loaded, device, dtype, copies * spec.length, most=LARGEST_NELBO_BATCH)
        size, done = settings.batch_size or even_batch_size(len(numbers), 1, most), 0
        batches = held_out.batches_of(numbers, device, size=size, labels=spec.model.labels) if numbers else iter(())
        for batch in batches:
            with compute_context(device, dtype):
                terms_B2 = nelbo_terms(
                    loaded.model,
                    [batch],
                    spec.schedule,
                    mask_id=spec.mask_id,
                    seed=settings.seed,
                    t_min=settings.t_min,
                    strata=[strata[group] for group in sorted({stratum_of[number] for number in batch.ids.tolist()})],
                    draws=settings.draws,
                    condition=condition,
                    passes=settings.passes,
                    block_length=spec.diffusion.block_length,
                )
            yield numbers[done : done + len(batch)], {"terms": terms_B2.numpy()}
            done += len(batch)
        loaded.await_peers(report_progress)

    passes = settings.passes if condition else 0
    own = {"passes": passes, "draws": settings.draws, "t_min": settings.t_min, "noise": settings.seed}
    kept = None if parts is None else parts.of(**own, count=len(held_out), precision=str(dtype))
    columns = compute_divided(len(held_out), compute, kept)
    return None if columns is None else nelbo_of(torch.from_numpy(columns["terms"]))
