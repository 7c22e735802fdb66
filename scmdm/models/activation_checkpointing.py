"""Activation checkpointing: activations of a block are recomputed in the backward pass, to save memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scmdm.torch_private import ATTENTION_OPERATORS, leave_profiler_out_of_checkpoints

_aten = torch.ops.aten
# "selective" keeps the results of matrix products and attention, which take long to compute but little memory.
_PRODUCTS = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,
    _aten._grouped_mm.default,
)
_KEPT = frozenset({*_PRODUCTS, *ATTENTION_OPERATORS})


def run_block(block: Callable[..., Tensor], kind: str, *arguments: Any) -> Tensor:
    """Run a block, and keep activations for the backward pass according to `kind`.

    "none" keeps all, "selective" those of `_KEPT`, "full" only the block's input. Without gradients, none is kept.
    """
    if kind == "none" or not torch.is_grad_enabled():
        return block(*arguments)
    if kind == "full":
        return checkpoint(block, *arguments, use_reentrant=False)
    leave_profiler_out_of_checkpoints()
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    with _no_cached_casts():
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)


def in_float32(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """Apply a function that casts `x` to float32; the backward pass keeps `x` as it is and casts again.

    A compiled graph does this of its own accord.
    """
    if x.dtype == torch.float32 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x, *arguments)
    return checkpoint(function, x, *arguments, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Disable autocast's cache of casts.

    Otherwise a weight that an earlier pass has cast is cast in the recomputation but not in the forward pass, and torch
    refuses a different sequence of operators.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _keep_products(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
