"""Attention backends, forward and backward: why "auto" takes plain products for short sequences on a CPU."""

from __future__ import annotations

import functools

import torch

from benchmarks.timing import interleave, show
from scmdm.model.attention import attend, flash_unusable_because
from scmdm.parallel.engine import resolve_device, resolve_precision

SHAPES = ((256, 32), (64, 128), (16, 512))
HEADS, HEAD_WIDTH = 4, 32


def main() -> None:
    """Print the ratios for each shape."""
    device = resolve_device("auto")
    dtype = resolve_precision("auto", device)
    backends = ["sdpa", "matmul", *([] if flash_unusable_because(device.type, dtype) else ["flash"])]
    for batch, length in SHAPES:
        q = torch.randn(batch, length, HEADS, HEAD_WIDTH, device=device, dtype=dtype, requires_grad=True)
        functions = {backend: functools.partial(_forward_backward, q, backend) for backend in backends}
        show(f"attention, B = {batch}, L = {length}, {dtype}", interleave(functions), "sdpa")


def _forward_backward(q: torch.Tensor, backend: str) -> None:
    attend(q, q, q, backend).sum().backward()
