"""Element-wise functions that a GPU runs as one kernel instead of one for each of their operations."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@functools.cache
def can_fuse() -> bool:
    """Whether torch.compile can make kernels for a GPU here: Triton, and a C compiler that builds its launchers."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(name) for name in compilers if name)


def fused(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function`, whose arguments are tensors; on a GPU compiled, once for any size of their first dimensions (but 1).
    Where that is not possible it runs as it is."""
    compiled: Any = None

    @functools.wraps(function)
    def call(*arguments: Tensor) -> _T:
        nonlocal compiled
        if arguments[0].device.type != "cuda" or not can_fuse():
            return function(*arguments)
        if compiled is None:  # not before it is needed: the compiler takes a second to import
            compiled = torch.compile(function)
        for tensor in arguments:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        result: _T = compiled(*arguments)
        return result

    return call
