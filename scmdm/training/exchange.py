"""The one collective of a step besides those of the engine: sums over this step, and the samples of the next one.

A step needs the ids and the numbers of valid tokens of its whole global batch before its first pass. They come with the
collective of the step before, together with that step's loss and with the signals that ranks have received. With
`train.padding=batch` the valid tokens depend on the longest sample of all ranks: it comes one collective earlier.

The loads of a mixture's experts are reduced in a second collective: gathered, each rank would receive those of every
other.

Legend: B this rank's sequences of a step, N sequences of the global batch, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.diffusion.state import Sequences
from scmdm.distributed.engine import Engine


@dataclass(frozen=True)
class Upcoming:
    """Samples that this rank has read for the next steps."""

    sequences: Sequences | None  # of the next step, if there is one
    longest_after: int = 0  # tokens of the longest sample of the step after it


@dataclass(frozen=True)
class GlobalBatch:
    """Ids and lengths of all samples of a step, which every rank has."""

    ids: Tensor  # (N,) int64
    valid_tokens: Tensor  # (N,) int64


@dataclass(frozen=True)
class Exchange:
    """Result of the collective of a step, on all ranks."""

    loss: Tensor  # float32 scalar: sum over the ranks
    signal: Tensor  # float64 scalar: largest number of a signal that a rank has received; 0: none
    upcoming: GlobalBatch | None  # of the next step, if there is one
    longest_after: Tensor  # float64 scalar: `Upcoming.longest_after`, the largest of all ranks
    counts: Tensor | None = None  # int64: sums over the ranks


def exchange(
    engine: Engine,
    upcoming: Upcoming,
    loss: Tensor | None = None,
    signal: int = 0,
    counts: Tensor | None = None,
) -> Exchange:
    """Exchange this rank's sum of the loss, its signal, its part of the samples of the next steps, and other counts.

    All ranks call this together, with an equal number of samples. The host does not wait for the device.
    """
    device, ranks = engine.device, engine.world_size
    own_loss = torch.zeros(1, dtype=torch.float64, device=device) if loss is None else loss.double().view(1)
    # Fills, because a copy of a number to a GPU waits for it.
    numbers = (torch.full((1,), n, dtype=torch.float64, device=device) for n in (signal, upcoming.longest_after))
    sums = torch.cat([own_loss, *numbers])
    following = upcoming.sequences
    samples = [] if following is None else [following.ids, following.valid.sum(1)]
    sent = torch.cat([sums.view(torch.int64), *samples])
    found_R = engine.all_gather(sent, all_ranks=True).view(ranks, -1)
    sums_R3 = found_R[:, : len(sums)].contiguous().view(torch.float64)
    summed = None if counts is None else engine.all_reduce(counts)
    batch = None
    if following is not None:
        parts = found_R[:: ranks // engine.data_size, len(sums) :]
        ids, valid_tokens = parts.split(len(following), dim=1)
        batch = GlobalBatch(ids.flatten(), valid_tokens.flatten())
    return Exchange(sums_R3[:, 0].sum().float(), sums_R3[:, 1].max(), batch, sums_R3[:, 2].max(), summed)
