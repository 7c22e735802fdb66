"""Attention without a causal mask: one function, several kernels.

Keys and values may have fewer heads than queries (grouped-query attention, arXiv 2305.13245): head g of G serves the
query heads g R to g R + R - 1, for R = H / G. They are never expanded to the query heads.

Legend: B batch, L length, H heads of queries, G heads of keys and values, R query heads per head of keys and values, K
width of a head, C packed documents of a batch plus one, N ranks that share a sequence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from scmdm.diffusion.blocks import Places, both_copies, dense_mask, may_attend, places_of
from scmdm.diffusion.fused import can_fuse
from scmdm.diffusion.key_value_cache import LayerCache, Window
from scmdm.diffusion.packing import Packing
from scmdm.errors import UserError
from scmdm.torch_private import constant_under_compile

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Masks(NamedTuple):
    """What restricts the attention of a block of the network: at most one of `allowed` and `bounds_C`."""

    allowed: Tensor | BlockMask | None = None  # see `attend`
    bounds_C: Tensor | None = None
    cache: LayerCache | None = None  # keys and values of the positions that are not evaluated


NO_MASKS = Masks()
# With these, FlexAttention computes the attention of a model of blocks on a GPU, without a dense mask.
FLEX_BACKENDS = ("auto", "flash", "varlen")

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
# Kernels that take grouped keys and values. torch's "efficient" kernel does not, and its plain operators ("math")
# expand them and keep all scores: with these lists torch raises an error instead of using either.
_GROUPED = [SDPBackend.FLASH_ATTENTION]
_GROUPED_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *_GROUPED]


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


def masks_of(packing: Packing | None, backend: str, visible_LL: Tensor | None = None) -> Masks:
    """Return the masks of `attend` that separate packed documents: bounds for varlen kernels, otherwise a mask.

    With `visible_LL` a query sees only these keys, of its own document.
    """
    if visible_LL is not None:
        return Masks(visible_LL[None, None] if packing is None else visible_LL & packing.allowed_B1LL)
    if packing is None:
        return NO_MASKS
    by_bounds = backend in ("flash", "varlen")
    return Masks(bounds_C=packing.bounds_C) if by_bounds else Masks(packing.allowed_B1LL)


def masks_of_blocks(
    length: int, block_length: int, packing: Packing | None, device: torch.device, backend: str, *, copies: int
) -> Masks:
    """Return the masks of a model of blocks, for `copies` of each sequence: one, or two (`[z | x]`).

    FlexAttention skips what is masked, where it has a backward pass: on GPUs. Elsewhere the mask is dense.
    """
    places_RL = places_of(length, block_length, packing, device)
    places_RL = both_copies(places_RL) if copies == 2 else places_RL
    return Masks(_flex_mask(places_RL) if _flex_runs(device.type, backend) else dense_mask(places_RL, places_RL))


def masks_of_window(window: Window, block_length: int | None, packing: Packing | None) -> Masks:
    """Return the masks of a window's queries against all keys before its end; `block_length` of a model of blocks."""
    device = window.start_B.device
    if block_length is None or window.sees_all:
        if packing is None:
            return NO_MASKS
        documents_BL = packing.documents_BL
        return Masks((window.cut(documents_BL)[:, :, None] == documents_BL[:, None, : window.end])[:, None])
    places_RL = places_of(window.cache.length, block_length, packing, device)
    rows = len(window.start_B)
    own = places_RL.apply(lambda values_RL: window.cut(values_RL.expand(rows, -1)))
    return Masks(dense_mask(own, places_RL[:, : window.end]))


def _flex_runs(device_type: str, backend: str) -> bool:
    return device_type == "cuda" and backend in FLEX_BACKENDS and can_fuse()


def _flex_mask(places_RL: Places) -> BlockMask:
    """Return the mask of `dense_mask` in the form of FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = places_RL.block.shape
    alone = rows == 1

    def allowed(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = 0 if alone else b
        return may_attend(places_RL[row, q], places_RL[row, k])

    device = str(places_RL.block.device)
    return create_block_mask(allowed, None if alone else rows, None, length, length, device=device)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def _attend_flex(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, mask: BlockMask) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    out: Tensor = _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def attend(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGK: Tensor,
    backend: str,
    allowed: Tensor | BlockMask | None = None,
    bounds_C: Tensor | None = None,
    *,
    repeated: bool = False,
) -> Tensor:
    """Compute softmax attention of queries (B, L, H, K), keys and values (B, L, G, K); G divides H.

    Scores are scaled by 1/sqrt(K). `allowed` is a mask of query and key positions, bool (B or 1, 1, L, L) or in the
    form of FlexAttention; `bounds_C` (`Packing.bounds_C`) restricts attention to the query's document. At most one is
    given. There may be more keys than queries, except with `bounds_C`. `repeated`: see `choose_backend`. Returns
    (B, L, H, K).
    """
    if bounds_C is not None:
        return _attend_documents(q_BLHK, k_BLGK, v_BLGK, bounds_C, backend)
    if allowed is not None and not isinstance(allowed, Tensor):
        return _attend_flex(q_BLHK, k_BLGK, v_BLGK, allowed)
    allowed_B1LL = allowed
    chosen = choose_backend(backend, q_BLHK.device.type, q_BLHK.dtype, q_BLHK.shape[1], repeated=repeated)
    if allowed_B1LL is not None and chosen in ("flash", "cudnn"):
        chosen = "sdpa"
    if chosen == "flash":
        from flash_attn import flash_attn_func

        return flash_attn_func(q_BLHK, k_BLGK, v_BLGK, causal=False)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    if chosen == "matmul":
        return _attend_by_products(q, k, v, allowed_B1LL).transpose(1, 2)
    if q.shape[1] == k.shape[1]:
        with sdpa_kernel(_CUDNN_FIRST, set_priority=True) if chosen == "cudnn" else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_B1LL).transpose(1, 2)
    return _attend_grouped(q, k, v, allowed_B1LL, cudnn=chosen == "cudnn").transpose(1, 2)


def _attend_by_products(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, allowed_B1LL: Tensor | None) -> Tensor:
    """Compute attention (B, H, L, K) by matrix products, with the query heads of a group as further rows of one."""
    groups, length, (keys, width) = k_BGLK.shape[1], q_BHLK.shape[2], k_BGLK.shape[2:]
    q, scale = q_BHLK.unflatten(1, (groups, -1)).flatten(2, 3), width**-0.5
    scaled = (q * scale) @ k_BGLK.transpose(-1, -2) if keys > width else q @ k_BGLK.transpose(-1, -2) * scale
    scores = scaled.unflatten(2, (-1, length))  # (B, G, R, L, keys)
    if allowed_B1LL is not None:
        scores = scores.masked_fill(~allowed_B1LL[:, :, None], float("-inf"))
    out = scores.softmax(-1).flatten(2, 3) @ v_BGLK
    return out.unflatten(2, (-1, length)).flatten(1, 2)


def _attend_grouped(
    q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, allowed_B1LL: Tensor | None, *, cudnn: bool
) -> Tensor:
    """Compute attention (B, H, L, K) by a fused kernel of torch for G < H.

    Where no kernel takes grouped heads (on a GPU with a mask, or in float32), every call takes one query head of each
    group.
    """
    if _takes_groups(q_BHLK.device.type, q_BHLK.dtype, allowed_B1LL is not None):
        with sdpa_kernel(_GROUPED_CUDNN_FIRST if cudnn else _GROUPED, set_priority=True):
            return F.scaled_dot_product_attention(q_BHLK, k_BGLK, v_BGLK, attn_mask=allowed_B1LL, enable_gqa=True)
    q_BGRLK, bias = q_BHLK.unflatten(1, (k_BGLK.shape[1], -1)), None
    if allowed_B1LL is not None:  # converted once; torch would convert a bool mask in every call, and keep each result
        bias = torch.zeros_like(allowed_B1LL, dtype=q_BHLK.dtype).masked_fill_(~allowed_B1LL, float("-inf"))
    heads = (F.scaled_dot_product_attention(q_BGLK, k_BGLK, v_BGLK, attn_mask=bias) for q_BGLK in q_BGRLK.unbind(2))
    return torch.stack(list(heads), dim=2).flatten(1, 2)


@constant_under_compile
def _takes_groups(device_type: str, dtype: torch.dtype, masked: bool) -> bool:
    """Return whether a fused kernel of torch takes grouped heads: on CPUs always, on GPUs the flash kernel."""
    if device_type == "cpu":
        return True
    return (
        device_type == "cuda"
        and not masked
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def _attend_documents(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, bounds_C: Tensor, backend: str) -> Tensor:
    length = q_BLHK.shape[1]
    kernel = _flash_varlen() if backend == "flash" else _torch_varlen(grouped=q_BLHK.shape[2] != k_BLGK.shape[2])
    q, k, v = (x.flatten(0, 1) for x in (q_BLHK, k_BLGK, v_BLGK))
    # The length of a sample bounds that of its documents; the longest is unknown to the host.
    out: Tensor = kernel(q, k, v, bounds_C, bounds_C, length, length)
    return out.unflatten(0, q_BLHK.shape[:2])


def _flash_varlen() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _torch_varlen(*, grouped: bool) -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    # The kernel always takes grouped heads. Newer versions of torch (2.14, not 2.11) require a flag for them.
    flagged = grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if flagged else varlen_attn


def attend_slices(
    q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, backend: str, context: DeviceMesh, *, repeated: bool = False
) -> Tensor:
    """Compute `attend` for sequences sliced over the ranks of `context`, in rank order; return this rank's slice.

    One all-to-all gives each rank whole sequences for its share of the heads, another restores the slices
    (DeepSpeed-Ulysses, arXiv 2309.14509). The number of ranks must divide H. Keys and values are sent as they are if it
    divides G, too; otherwise copies of their heads make up the next multiple (`exchanged_kv_heads`).
    """
    ranks, heads, groups = context.size(), q_BLHK.shape[2], k_BLGK.shape[2]
    copies = exchanged_kv_heads(heads, groups, ranks) // groups
    k, v = (x.repeat_interleave(copies, dim=2) if copies > 1 else x for x in (k_BLGK, v_BLGK))
    shares = [x.unflatten(2, (ranks, -1)) for x in (q_BLHK, k, v)]  # (B, L, N, heads for a rank, K)
    whole = _exchange(torch.cat(shares, dim=3).flatten(2, 3), context, 1, 2)
    q, k, v = whole.split([share.shape[3] for share in shares], dim=2)
    return _exchange(attend(q, k, v, backend, repeated=repeated), context, 2, 1)


def exchanged_kv_heads(heads: int, kv_heads: int, ranks: int) -> int:
    """Return how many heads of keys the ranks of a context exchange: the least multiple that all of them can share."""
    assert heads % kv_heads == 0
    assert heads % ranks == 0
    return math.lcm(kv_heads, ranks)


def _exchange(x: Tensor, context: DeviceMesh, sliced: int, slice_next: int) -> Tensor:
    """Gather the slices of dimension `sliced`, and slice dimension `slice_next` instead."""
    whole = DTensor.from_local(x, context, (Shard(sliced),), run_check=False)
    return whole.redistribute(placements=(Shard(slice_next),)).to_local()
