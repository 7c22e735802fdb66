"""Attention kernels, forward and backward: the measurements behind `model.attention=auto`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from benchmarks.timing import Timing, interleave, show
from scmdm.diffusion.packing import make_packing
from scmdm.distributed.engine import resolve_device, resolve_precision
from scmdm.models.attention import NO_MASKS, Masks, attend, flash_unusable_because, masks_of

# B, L, H, K
SHAPES = ((256, 32, 4, 32), (64, 128, 4, 32), (16, 512, 4, 32))
GPU_SHAPES = ((32, 1024, 12, 64), (16, 1024, 16, 128))


def main() -> None:
    """Print ratios of the kernels for each shape."""
    device = resolve_device("auto")
    for title, timings in measure(GPU_SHAPES if device.type == "cuda" else SHAPES).items():
        show(title, timings, "sdpa")


def measure(shapes: Sequence[tuple[int, int, int, int]]) -> dict[str, dict[str, Timing]]:
    """Time the kernels of this device on each shape, without and, on a GPU, with four documents in a sequence."""
    device = resolve_device("auto")
    dtype = resolve_precision("auto", device)
    gpu = device.type == "cuda"
    flash = flash_unusable_because(device.type, dtype) is None
    backends = ["sdpa", "matmul", *(["cudnn"] if gpu else []), *(["flash"] if flash else [])]
    found = {}
    for shape in shapes:
        q = torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)
        functions = {backend: functools.partial(_forward_backward, q, backend) for backend in backends}
        batch, length, *_ = shape
        title = f"attention, B = {batch}, L = {length}, {dtype}"
        found[title] = interleave(functions)
        if gpu:
            documents_L = torch.arange(length, device=device).div(length // 4, rounding_mode="floor")
            packing = make_packing(documents_L.expand(batch, -1))
            packed = {
                backend: functools.partial(_forward_backward, q, backend, masks_of(packing, backend))
                for backend in ("sdpa", "varlen", *(["flash"] if flash else []))
            }
            found[f"{title}, four documents in each"] = interleave(packed)
    return found


def _forward_backward(q: torch.Tensor, backend: str, masks: Masks = NO_MASKS) -> None:
    attend(q, q, q, backend, masks.allowed, masks.bounds_C).sum().backward()
