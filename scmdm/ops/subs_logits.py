"""Logits with zero masking probability, part of MDLM's SUBS parameterization (arXiv 2406.07524, section 3.2.3).

Legend: N positions, D width, V vocabulary with the mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def subs_bias(bias_V: Tensor, mask_id: int) -> Tensor:
    """Return the bias (V,) in float32 with minus infinity at the mask."""
    return bias_V.float().index_fill(0, torch.tensor([mask_id], device=bias_V.device), float("-inf"))


def subs_logits(h_ND: Tensor, weight_VD: Tensor, subs_bias_V: Tensor) -> Tensor:
    """Return logits (N, V) in float32; the product runs in the dtype of `h_ND`."""
    return F.linear(h_ND, weight_VD.to(h_ND.dtype)).float().add_(subs_bias_V)
