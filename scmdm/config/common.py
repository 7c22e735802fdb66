"""Keys that several configurations share."""

from __future__ import annotations

from typing import Any

from scmdm.config.fields import key

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


def batch_size_key() -> Any:
    """Declare the number of samples drawn at once."""
    return key(
        None,
        help="samples drawn at once; null: 64 on each CPU core, 1024 on a GPU",
        at_least=1,
        at_most=2**31,
    )
