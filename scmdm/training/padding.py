"""Lengths of padded samples in a batch, and which of their padding counts.

A sample takes part with a length of its own, up to which its padding counts as `pad_policy` says. What follows is cut
off, or neither seen nor counted. This length does not depend on how a global batch is divided into micro-batches or
over ranks, and neither do the loss and the gradient.

Legend: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scmdm.config.training import TrainConfig
from scmdm.data.manifest import Manifest


def own_lengths(
    tokens_BL: Tensor, manifest: Manifest, config: TrainConfig, longest_of_all: Callable[[int], int] = int
) -> Tensor | None:
    """Return the length (B,) with which each sample takes part; None: that of the data.

    With `train.padding=batch` it is that of the longest sample of the batch, with `sample` each sample's own, both
    rounded up to a multiple of `train.pad_multiple`. `longest_of_all` returns the largest of all ranks' values.
    """
    if config.padding == "length":
        return None
    used_B = used_lengths(tokens_BL, manifest)
    if config.padding == "batch":
        used_B = torch.full_like(used_B, longest_of_all(max(used_B.tolist(), default=0)))
    multiple = config.pad_multiple
    return (-(-used_B // multiple) * multiple).clamp(max=tokens_BL.shape[1])


def used_lengths(tokens_BL: Tensor, manifest: Manifest) -> Tensor:
    """Return the length (B,) of each sample without its padding, which may be [EOS]: the first then ends the sample."""
    length = tokens_BL.shape[1]
    filled_BL = tokens_BL != manifest.padding_id
    used_B = torch.where(filled_BL, torch.arange(1, length + 1, device=tokens_BL.device), 0).amax(1)
    return (used_B + int(manifest.padding_id == manifest.eos_id)).clamp(max=length)
