"""Batch sizes of sampling and of likelihoods, from the memory that is free.

Legend: B batch, L length, D width, V vocabulary with the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from scmdm.config.model import ModelConfig
from scmdm.diffusion.sampler import DRAW_ROWS
from scmdm.models.model_files import LoadedModel
from scmdm.system.memory import available_bytes

CPU_BATCH = 64  # sequences of one core: small models and their activations fit its cache
LARGEST_BATCH = 1024  # a GPU is full long before
LARGEST_NELBO_BATCH = 256  # sequences of a likelihood
_COPIES_OF_LOGITS = 6  # float64 or int64 arrays: logits, their shaped copy, words of the noise, uniforms
_MASK_BYTES = 5  # of a pair: the mask, and its copy that a kernel adds
_USABLE = 0.8  # of free memory; the rest is for fragmentation and the libraries' work spaces


def evaluation_bytes_per_token(model: ModelConfig, *, bytes_per_number: int, predictions: int = 1) -> int:
    """Return the peak memory of one evaluation without gradients, per token of the batch.

    It is that of a block, and of what lives beside it: the residual stream and the estimate in float32. `predictions`
    is 2 with guidance, whose evaluations share a batch.
    """
    width, heads = model.width, model.attention_width
    stream = 4 * width * 3  # the residual stream, its sum with a branch, a normalised copy
    attention = bytes_per_number * (width + 3 * heads + 3 * heads + heads)  # input, projections, rotated copies, output
    mlp = bytes_per_number * model.mlp_numbers
    carried = 4 * width * 4 if model.self_conditioned else 4 * width  # hidden states, estimates of two steps
    noise = 8 * 16  # words and uniforms of the positions to reveal
    return predictions * (stream + max(attention, mlp) + carried) + noise


def fixed_bytes(model: ModelConfig, vocab_size: int) -> int:
    """Return the memory of an evaluation that does not depend on the batch: logits of a chunk, and their draws."""
    drawn = DRAW_ROWS * vocab_size * 8 * _COPIES_OF_LOGITS
    head = (model.head_chunk or DRAW_ROWS) * vocab_size * 4 * 3
    return max(drawn, head)


def copied_bytes(numel: int, *, held: int, computed: int) -> int:
    """Return the memory of the copies of `numel` weights that autocast keeps during a batch.

    `held` and `computed` are the bytes of a weight and of a number in a matrix product.
    """
    return numel * computed if computed < held else 0


def evaluation_bytes(
    rows: int,
    model: ModelConfig,
    *,
    length: int,
    vocab_size: int,
    bytes_per_number: int,
    predictions: int = 1,
    padded: bool = False,
    cached: bool = False,
) -> int:
    """Return the memory of an evaluation of `rows` sequences of `length` tokens, without the weights.

    Those of a `padded` batch, whose lengths differ, need a mask of all pairs of positions; `cached` ones, keys and
    values of all layers.
    """
    per_token = evaluation_bytes_per_token(model, bytes_per_number=bytes_per_number, predictions=predictions)
    mask = predictions * length * _MASK_BYTES if padded else 0
    cache = 2 * model.layers * model.kv_width * bytes_per_number * predictions if cached else 0
    return fixed_bytes(model, vocab_size) + rows * length * (per_token + mask + cache)


def batch_size_for(free_bytes: int, needed: Callable[[int], int], most: int = LARGEST_BATCH) -> int:
    """Return how many sequences fit into `free_bytes`: 1 ... `most`. `needed` is `evaluation_bytes` of a batch size."""
    none, one = needed(0), needed(1)
    return max(1, min(most, (int(free_bytes * _USABLE) - none) // (one - none)))


def fitting_batch_size(
    loaded: LoadedModel,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    *,
    workers: int = 1,
    guided: bool = False,
    padded: bool = False,
    cached: bool = False,
    most: int | None = None,
) -> int:
    """Return how many sequences a loaded model evaluates at once, in each of `workers` threads.

    Without `most`, on a CPU it is what a core's cache holds of a small model, unless the memory holds less.
    """
    copies = sum(
        copied_bytes(parameter.numel(), held=parameter.dtype.itemsize, computed=dtype.itemsize)
        for parameter in loaded.model.parameters()
    )
    needed = partial(
        evaluation_bytes,
        model=loaded.spec.model,
        length=length,
        vocab_size=loaded.spec.vocab_size,
        bytes_per_number=dtype.itemsize,
        predictions=2 if guided else 1,
        padded=padded,
        cached=cached,
    )
    most = most or (CPU_BATCH if device.type == "cpu" else LARGEST_BATCH)
    return batch_size_for((free_bytes(device) - copies) // workers, needed, most)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; what torch holds without using it counts as free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_bytes()


def even_batch_size(count: int, workers: int, most: int) -> int:
    """Return the batch size, at most `most`, that gives each of `workers` the same number of batches of `count` items.

    A batch of a fixed size would leave workers idle during the last round.
    """
    rounds = max(1, -(-count // (workers * most)))
    return max(1, -(-count // (workers * rounds)))
