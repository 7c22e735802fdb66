"""Keys that several configurations share."""

from __future__ import annotations

from typing import Any

from scmdm.config.fields import key, require

LARGEST_SEED = 2**62


def seed_key() -> Any:
    """Declare the seed of every random draw."""
    return key(0, help="seed of every random draw", at_least=0, at_most=LARGEST_SEED)


def device_key(*, on_resume: bool = False) -> Any:
    """Declare the device to compute on."""
    return key(
        "auto",
        help="device to compute on; auto: the GPU, if there is one",
        choices=("auto", "cpu", "cuda"),
        on_resume=on_resume,
    )


def precision_key() -> Any:
    """Declare the precision of the network's computations."""
    return key(
        "auto",
        help="precision of the network; auto: bfloat16 where the hardware has it",
        choices=("auto", "float32", "bfloat16"),
    )


def threads_key(*, on_resume: bool = False) -> Any:
    """Declare the number of CPU threads."""
    return key(0, help="CPU threads; 0: one per core", at_least=0, at_most=1024, on_resume=on_resume)


def verify_key(*, on_resume: bool = False) -> Any:
    """Declare how a model's files are verified before they are used."""
    return key(
        "share",
        help="before a model is used; share: each process hashes its share of what is used; full: the first process "
        "hashes every file; sizes: only names and sizes are compared",
        choices=("share", "full", "sizes"),
        on_resume=on_resume,
    )


def weights_key() -> Any:
    """Declare the choice between averaged and raw weights."""
    return key("ema", help="weights to use; ema: the averages, where the model has them", choices=("ema", "raw"))


def compile_key() -> Any:
    """Declare what of the network is compiled for sampling and evaluation."""
    return key(
        "none",
        help="torch.compile in evaluations; block: each block, with one graph for all, which takes up to a minute at "
        "the start; a CPU needs a C++ compiler; not with shards above 1",
        choices=("none", "block"),
    )


def weights_dtype_key() -> Any:
    """Declare the dtype in which weights are held for sampling and evaluation."""
    return key(
        "float32",
        help="dtype in which weights are held; bfloat16: half the memory, with precision=bfloat16",
        choices=("float32", "bfloat16"),
    )


def shards_key() -> Any:
    """Declare the number of ranks that share the weights of a model that does not fit one device."""
    return key(
        1,
        help="consecutive ranks that share the weights (FSDP2), for a model that does not fit one device; 1: none do",
        at_least=1,
        at_most=2**20,
    )


def batch_size_key() -> Any:
    """Declare the number of samples that a rank evaluates at once."""
    return key(
        None,
        help="samples at once; null: on a GPU what fits its free memory, on a CPU at most 64 on each core",
        at_least=1,
        at_most=2**31,
    )


def resolve_weights_dtype(weights_dtype: str, precision: str) -> str:
    """Return the precision for weights of a dtype: bfloat16 for weights in bfloat16 and `precision=auto`.

    Raises UserError for weights in bfloat16 and `precision=float32`.
    """
    if weights_dtype == "float32":
        return precision
    require(precision != "float32", "precision", precision, f"auto or {weights_dtype} with weights_dtype=bfloat16")
    return weights_dtype


def check_compile(what: str, shards: int) -> None:
    """Raise UserError for a shared model that is to be compiled."""
    require(what == "none" or shards == 1, "compile", what, f"none with shards={shards}")
