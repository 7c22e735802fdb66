"""Element-wise functions that a GPU runs as one compiled kernel instead of one kernel per operation."""

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
    """Return whether Triton, a C compiler and Python's headers are installed, which compiled GPU kernels need."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    if importlib.util.find_spec("triton") is None or not any(shutil.which(name) for name in compilers if name):
        return False
    return Path(sysconfig.get_paths()["include"], "Python.h").is_file()


def fused(function: Callable[..., _T]) -> Callable[..., _T]:
    """Decorator: compile a function of tensors on its first call on a GPU; elsewhere run it as it is.

    Gradients do not flow through it. torch treats a dimension as variable from its first change on, so that it compiles
    once more at most for each dimension that varies.
    """
    compiled: Any = None

    @functools.wraps(function)
    def call(*arguments: Tensor) -> _T:
        nonlocal compiled
        if arguments[0].device.type != "cuda" or not can_fuse():
            return function(*arguments)
        if compiled is None:  # lazily: importing the compiler takes a second
            compiled = torch.compile(function)
        with torch.no_grad():  # autograd's state is part of what is compiled
            result: _T = compiled(*arguments)
        return result

    return call
