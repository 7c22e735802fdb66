"""`torch.compile` of a network, in training and in evaluations."""

from __future__ import annotations

import os
import shutil

import torch

from scmdm.errors import UserError
from scmdm.models.network import Network
from scmdm.torch_private import compile_arguments

# With and without gradients, in training and evaluation, for whole and partial batches, fixed and changing lengths; by
# default torch would stop at 8.
_GRAPHS = 64


def compile_model(model: Network, what: str) -> None:
    """Compile what `model.compile` names, in place, so that names of parameters do not change.

    With "block" one graph serves all blocks; with "trunk" they are one graph.
    """
    if what == "trunk":
        model.compile_trunk(**compile_arguments(_GRAPHS))
    if what == "block":
        model.compile_blocks(**compile_arguments(_GRAPHS))


def check_compiler(key: str, what: str, device: torch.device) -> None:
    """Raise UserError if `key`, whose value is `what`, needs a compiler that the machine does not have."""
    if what != "none" and device.type == "cpu" and not cpp_compiler():
        raise UserError(f"{key}={what} needs a C++ compiler on a CPU, and none was found; install g++ or set CXX")


def cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile uses on a CPU, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))
