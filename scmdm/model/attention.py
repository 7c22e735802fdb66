"""Bidirectional attention behind one function, whatever computes it.

Legend: B batch, L length, H heads, K width of a head.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from scmdm.errors import UserError

# On CPU in bfloat16 torch's fused kernel takes 15 x as long in its backward as three plain products (L = 32) and loses
# up to about this length. In float32 it wins at any; benchmarks/attention.py prints the ratios.
_CPU_MATMUL_LENGTH = 256
# torch's kernels for "cudnn", the first that can: cuDNN's has no plan for some shapes and dtypes.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@functools.cache
def flash_unusable_because(device_type: str, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run for this device and dtype, or None when it can. Importing is not enough to know."""
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
    """Raise UserError when `backend` is asked for by name and cannot run."""
    reason = flash_unusable_because(device_type, dtype) if backend == "flash" else None
    if backend == "cudnn" and (device_type != "cuda" or dtype == torch.float32):
        reason = f"cuDNN's attention needs a CUDA device and bfloat16, not {device_type} and {dtype}"
    if reason is not None:
        raise UserError(f"model.attention={backend} cannot run: {reason}; use model.attention=auto or sdpa")


def choose_backend(backend: str, device_type: str, dtype: torch.dtype, length: int, *, repeated: bool = False) -> str:
    """What "auto" means for this input: "flash" where it runs, "matmul" for short bfloat16 on a CPU, else "sdpa".

    `repeated`: many calls will have this shape. cuDNN makes a plan for every new one, which takes longer than many
    calls, and is the fastest of torch's kernels after that.
    """
    if backend != "auto":
        return backend
    if device_type == "cpu":
        return "matmul" if dtype != torch.float32 and length <= _CPU_MATMUL_LENGTH else "sdpa"
    if _flash_runs(device_type, dtype):
        return "flash"
    return "cudnn" if repeated and dtype != torch.float32 else "sdpa"


def _flash_runs(device_type: str, dtype: torch.dtype) -> bool:
    return flash_unusable_because(device_type, dtype) is None


# `torch.compiler.assume_constant_result`, which would import the compiler into every process: a second.
_flash_runs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHK: Tensor,
    backend: str,
    allowed_B1LL: Tensor | None = None,
    *,
    repeated: bool = False,
) -> Tensor:
    """Softmax attention without a causal mask, (B, L, H, K) each, scaled by 1/sqrt(K). Returns (B, L, H, K).

    `allowed_B1LL` (bool) says which position (last) one (before it) sees, by default all. Raises UserError for a
    backend that cannot keep to it. `repeated`: see `choose_backend`.
    """
    chosen = choose_backend(backend, q_BLHK.device.type, q_BLHK.dtype, q_BLHK.shape[1], repeated=repeated)
    if allowed_B1LL is not None and chosen == "flash":
        if backend == "flash":
            raise UserError("model.attention=flash has no mask for packed samples (framing=packed); use auto or sdpa")
        chosen = "sdpa"
    if chosen == "flash":
        from flash_attn import flash_attn_func

        return flash_attn_func(q_BLHK, k_BLHK, v_BLHK, causal=False)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    if chosen == "cudnn" and allowed_B1LL is None:
        with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if chosen in ("sdpa", "cudnn"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_B1LL).transpose(1, 2)
    scores_BHLL = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if allowed_B1LL is not None:
        scores_BHLL = scores_BHLL.masked_fill(~allowed_B1LL, float("-inf"))
    probabilities_BHLL = scores_BHLL.softmax(-1)
    return (probabilities_BHLL @ v).transpose(1, 2)


def attend_slices(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, backend: str, context: DeviceMesh, *, repeated: bool = False
) -> Tensor:
    """`attend` over sequences of which every rank of `context` holds a slice, in rank order; returns this rank's slice.

    An all-to-all gives each rank whole sequences of its share of the heads, another one gives the slices back
    (DeepSpeed-Ulysses, arXiv 2309.14509). The number of ranks must divide H.
    """
    qkv_3BLHK = _exchange(torch.stack((q_BLHK, k_BLHK, v_BLHK)), context, 2, 3)
    q, k, v = qkv_3BLHK.unbind()
    return _exchange(attend(q, k, v, backend, repeated=repeated), context, 2, 1)


def _exchange(x: Tensor, context: DeviceMesh, sliced: int, slice_next: int) -> Tensor:
    """Put the slices of dimension `sliced` together and cut `slice_next` instead."""
    whole = DTensor.from_local(x, context, (Shard(sliced),), run_check=False)
    return whole.redistribute(placements=(Shard(slice_next),)).to_local()
