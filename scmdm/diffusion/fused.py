"""Element-wise functions that a GPU runs as one kernel instead of one for each of their operations."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@functools.cache
def can_fuse() -> bool:
    """Whether torch.compile can make kernels for a GPU here: Triton, and what builds its launchers, a C compiler and
    Python's headers."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    if importlib.util.find_spec("triton") is None or not any(shutil.which(name) for name in compilers if name):
        return False
    return Path(sysconfig.get_paths()["include"], "Python.h").is_file()


def fused(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function`, whose arguments are tensors that need no gradient; on a GPU compiled, once for each way in which
    dimensions are 1 or more. Where that is not possible it runs as it is."""
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
        with torch.no_grad():  # or it would be compiled once more for each state of autograd
            result: _T = compiled(*arguments)
        return result

    return call
