"""Element-wise functions that a GPU runs as one kernel instead of one for each of their operations."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")


@functools.cache
def can_fuse() -> bool:
    """Whether torch.compile can make kernels for a GPU here: Triton, and a C compiler that builds its launchers."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(name) for name in compilers if name)


def fused(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`function`, whose first argument is a tensor; on a GPU compiled, once for any size of the tensors' first
    dimension. Where that is not possible it runs as it is."""
    compiled: Any = torch.compile(function, fullgraph=True)

    @functools.wraps(function)
    def call(*arguments: _P.args, **options: _P.kwargs) -> _T:
        first = arguments[0]
        assert isinstance(first, Tensor)
        if first.device.type != "cuda" or not can_fuse():
            return function(*arguments, **options)
        for tensor in arguments:
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[0] == first.shape[0]:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        result: _T = compiled(*arguments, **options)
        return result

    return call
