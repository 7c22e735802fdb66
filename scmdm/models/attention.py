"""Bidirectional attention: one function, several kernels.

Legend: B batch, L length, H heads, K width of a head, C packed documents of a batch plus one.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from scmdm.diffusion.packing import Packing
from scmdm.errors import UserError
from scmdm.torch_private import constant_under_compile

# The arguments `allowed_B1LL` and `bounds_C` of `attend`; at most one is given.
Masks: TypeAlias = tuple[Tensor | None, Tensor | None]
NO_MASKS: Masks = (None, None)

# On a CPU in bfloat16, the backward pass of torch's fused kernel takes 15 times as long as plain matrix products at
# L = 32, and is slower up to about this length. In float32 it is always faster (benchmarks/attention.py).
_CPU_MATMUL_LENGTH = 256
# Kernels for "cudnn", in order of preference: cuDNN does not support all shapes and dtypes.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@functools.cache
def flash_unusable_because(device_type: str, dtype: torch.dtype) -> str | None:
    """Return why flash-attn cannot run for this device and dtype; None if it can."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return "flash-attn needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn needs bfloat16 or float16, not {dtype}"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"flash-attn needs compute capability 8.0 or newer, not {torch.cuda.get_device_capability()}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"flash-attn does not import here ({error})"
    return None


def check_backend(backend: str, device_type: str, dtype: torch.dtype) -> None:
    """Raise UserError when the kernel that `model.attention` names cannot run."""
    reason = flash_unusable_because(device_type, dtype) if backend == "flash" else None
    if backend in ("cudnn", "varlen") and (device_type != "cuda" or dtype == torch.float32):
        kernel = "cuDNN's attention" if backend == "cudnn" else "torch's attention of packed samples"
        reason = f"{kernel} needs a CUDA device and bfloat16, not {device_type} and {dtype}"
    if reason is not None:
        raise UserError(f"model.attention={backend} cannot run: {reason}; use model.attention=auto or sdpa")


def choose_backend(backend: str, device_type: str, dtype: torch.dtype, length: int, *, repeated: bool = False) -> str:
    """Resolve "auto": "flash" where it runs, "matmul" for short bfloat16 on a CPU, otherwise "sdpa" or "cudnn".

    `repeated` says that many calls have this shape. cuDNN plans for every new shape, which takes longer than many
    calls; after that it is the fastest of torch's kernels.
    """
    if backend == "varlen":  # applies to packed samples only
        backend = "auto"
    if backend != "auto":
        return backend
    if device_type == "cpu":
        return "matmul" if dtype != torch.float32 and length <= _CPU_MATMUL_LENGTH else "sdpa"
    if _flash_runs(device_type, dtype):
        return "flash"
    return "cudnn" if repeated and dtype != torch.float32 else "sdpa"


@constant_under_compile
def _flash_runs(device_type: str, dtype: torch.dtype) -> bool:
    return flash_unusable_because(device_type, dtype) is None


def masks_of(packing: Packing | None, backend: str) -> Masks:
    """Return the masks of `attend` that separate packed documents: bounds for varlen kernels, otherwise a mask."""
    if packing is None:
        return NO_MASKS
    return (None, packing.bounds_C) if backend in ("flash", "varlen") else (packing.allowed_B1LL, None)


def attend(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHK: Tensor,
    backend: str,
    allowed_B1LL: Tensor | None = None,
    bounds_C: Tensor | None = None,
    *,
    repeated: bool = False,
) -> Tensor:
    """Compute bidirectional softmax attention of queries, keys and values (B, L, H, K), scaled by 1/sqrt(K).

    `allowed_B1LL` is a bool mask of query and key positions; `bounds_C` (`Packing.bounds_C`) restricts attention to the
    query's document. At most one is given. `repeated`: see `choose_backend`. Returns (B, L, H, K).
    """
    if bounds_C is not None:
        return _attend_documents(q_BLHK, k_BLHK, v_BLHK, bounds_C, backend)
    chosen = choose_backend(backend, q_BLHK.device.type, q_BLHK.dtype, q_BLHK.shape[1], repeated=repeated)
    if allowed_B1LL is not None and chosen in ("flash", "cudnn"):
        chosen = "sdpa"
    if chosen == "flash":
        from flash_attn import flash_attn_func

        return flash_attn_func(q_BLHK, k_BLHK, v_BLHK, causal=False)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    if chosen == "cudnn":
        with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_B1LL).transpose(1, 2)
    scores_BHLL = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if allowed_B1LL is not None:
        scores_BHLL = scores_BHLL.masked_fill(~allowed_B1LL, float("-inf"))
    probabilities_BHLL = scores_BHLL.softmax(-1)
    return (probabilities_BHLL @ v).transpose(1, 2)


def _attend_documents(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, bounds_C: Tensor, backend: str) -> Tensor:
    length = q_BLHK.shape[1]
    kernel = _flash_varlen() if backend == "flash" else _torch_varlen()
    q, k, v = (x.flatten(0, 1) for x in (q_BLHK, k_BLHK, v_BLHK))
    # The length of a sample bounds that of its documents; the longest is unknown to the host.
    out: Tensor = kernel(q, k, v, bounds_C, bounds_C, length, length)
    return out.unflatten(0, q_BLHK.shape[:2])


def _flash_varlen() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _torch_varlen() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def attend_slices(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, backend: str, context: DeviceMesh, *, repeated: bool = False
) -> Tensor:
    """Compute `attend` for sequences sliced over the ranks of `context`, in rank order; return this rank's slice.

    One all-to-all gives each rank whole sequences for its share of the heads, another restores the slices
    (DeepSpeed-Ulysses, arXiv 2309.14509). The number of ranks must divide H.
    """
    qkv_3BLHK = _exchange(torch.stack((q_BLHK, k_BLHK, v_BLHK)), context, 2, 3)
    q, k, v = qkv_3BLHK.unbind()
    return _exchange(attend(q, k, v, backend, repeated=repeated), context, 2, 1)


def _exchange(x: Tensor, context: DeviceMesh, sliced: int, slice_next: int) -> Tensor:
    """Gather the slices of dimension `sliced`, and slice dimension `slice_next` instead."""
    whole = DTensor.from_local(x, context, (Shard(sliced),), run_check=False)
    return whole.redistribute(placements=(Shard(slice_next),)).to_local()
