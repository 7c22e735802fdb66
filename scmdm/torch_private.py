"""Private torch API that scmdm uses, in one place: check this file first when torch is upgraded.

Each function names what it uses, why no public API does the same, and the torch version that it was last tested with.
It imports torch alone, so that every layer but `scmdm.diffusion`, which uses public API only, may import it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# `TorchDispatchMode` intercepts all operators, `tree_leaves` lists the tensors in their results. torch documents both
# for extensions, but their modules are private (torch 2.14).
__all__ = [
    "ATTENTION_OPERATORS",
    "TorchDispatchMode",
    "addmm_gelu",
    "compile_arguments",
    "constant_under_compile",
    "default_group_timeout",
    "fake_tensors",
    "forget_meshes",
    "grouped_mm",
    "has_grouped_mm",
    "is_fake",
    "leave_profiler_out_of_checkpoints",
    "lerp_all_",
    "nccl_trace",
    "scaled_mm",
    "storage_id",
    "tree_leaves",
]

# Operators that `scaled_dot_product_attention` dispatches to; they have no public names (torch 2.14).
ATTENTION_OPERATORS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)

_Function = TypeVar("_Function", bound=Callable[..., object])


def addmm_gelu(bias_O: Tensor, x_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """GELU (tanh form) of `x @ weight + bias`, (N, O), computed in the epilogue of the matrix product on a GPU.

    All three tensors have one dtype. Not differentiable. Uses `torch._addmm_activation`; no public function selects
    cuBLASLt's GELU epilogue (torch 2.14).
    """
    return torch._addmm_activation(bias_O, x_NI, weight_IO, use_gelu=True)


def compile_arguments(graphs: int) -> dict[str, Any]:
    """Arguments of `torch.compile` for this many graphs of a function, for other shapes and modes, before it gives up.

    In versions without the argument (torch 2.11), sets `torch._dynamo.config.recompile_limit` instead; in newer ones
    that setting holds for the calling thread only.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": graphs}
    from torch._dynamo import config  # slow to import

    config.recompile_limit = graphs
    return {}


@contextlib.contextmanager
def default_group_timeout(timeout: timedelta) -> Iterator[None]:
    """Set the timeout of process groups that are created in the block without one, by torch or DeepSpeed too.

    Sets the constants `default_pg_timeout` and `default_pg_nccl_timeout`. Groups do not inherit the timeout of
    `init_process_group`, and `init_device_mesh` takes none (torch 2.14).
    """
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    try:
        for name in names:
            setattr(distributed_c10d, name, timeout)
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def forget_meshes() -> None:
    """Forget what DTensor has cached of device meshes, whose process groups have been destroyed.

    Uses `torch.distributed.tensor.debug._clear_sharding_prop_cache`, no public function does it. Meshes of one
    shape are equal, so that results of later operators would otherwise refer to groups of an earlier mesh (torch 2.14).
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()


def constant_under_compile(function: _Function) -> _Function:
    """Decorator: `torch.compile` calls the function while tracing and treats its result as a constant.

    Sets the attribute that `torch.compiler.assume_constant_result` sets. The public function imports the compiler,
    which takes a second in every process (torch 2.14).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def leave_profiler_out_of_checkpoints() -> None:
    """Let selective checkpointing ignore profiler marks, which differ between forward pass and recomputation.

    FSDP2 adds some for a group within a checkpointed block, which torch would refuse. Changes
    `torch.utils.checkpoint.SAC_IGNORED_OPS`, for which there is no public setting (torch 2.14).
    """
    marks = torch.ops.profiler
    torch.utils.checkpoint.SAC_IGNORED_OPS.update(
        {marks._record_function_enter_new.default, marks._record_function_exit._RecordFunction}
    )


def lerp_all_(targets: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move each target by the fraction `weight` towards its end, in place and in few kernels.

    Uses `torch._foreach_lerp_`, as torch's optimizers and `torch.optim.swa_utils` do (torch 2.14).
    """
    torch._foreach_lerp_(list(targets), list(ends), weight)


def scaled_mm(a_MK: Tensor, b_KP: Tensor, scale_M1: Tensor, scale_1P: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `a @ b` (M, P) of FP8 matrices, multiplied by a scale per row of `a` and one per column of `b`.

    `b` is the transpose of a contiguous matrix. Uses `torch._scaled_mm`: the public `torch.nn.functional.scaled_mm`
    calls another operator, which newer versions alone have kernels for (torch 2.14).
    """
    return torch._scaled_mm(a_MK, b_KP, scale_a=scale_M1, scale_b=scale_1P, out_dtype=dtype)


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is one of `fake_tensors`, whose values cannot be read (torch 2.14)."""
    from torch._subclasses.fake_tensor import FakeTensor  # slow to import

    return isinstance(tensor, FakeTensor)


def has_grouped_mm() -> bool:
    """Return whether torch has the product of groups of rows with a matrix each."""
    return hasattr(torch, "_grouped_mm") or hasattr(torch.nn.functional, "grouped_mm")


def grouped_mm(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply consecutive groups of rows, which end at `ends_E`, with a matrix each, (P, O).

    Uses `torch._grouped_mm` where the public `torch.nn.functional.grouped_mm` is missing (torch 2.14 has it).
    """
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    product: Tensor = function(x_PI, weight_EIO, offs=ends_E)
    return product


def fake_tensors() -> contextlib.AbstractContextManager[object]:
    """Context in which new tensors have shapes, dtypes and devices, but no memory.

    Uses `torch._subclasses.FakeTensorMode`, which `torch.compile` and torch's memory tracker use; there is no public
    constructor (torch 2.14).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    return FakeTensorMode(allow_non_fake_inputs=True)


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return an identifier of a storage while it exists, also without memory.

    Uses `UntypedStorage._cdata`; `data_ptr` is 0 for storages of fake tensors (torch 2.14).
    """
    return storage._cdata


def nccl_trace() -> bytes:
    """Return the record of this process's recent NCCL collectives, as the flight recorder writes it to a file.

    Uses `torch._C._distributed_c10d._dump_nccl_trace`; torch itself writes the record only when a collective times out
    (torch 2.14).
    """
    trace: bytes = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
    return trace
