"""Activation memory of a training step, measured: the real model runs on fake tensors, and live storages are counted.

Fake tensors have shapes and no memory, so that a block of an 8B model is measured in a fraction of a second. Two small
numbers of layers are measured; every block adds the same, so more layers follow by linear extrapolation. Many positions
follow in the same way from two smaller numbers of them, in one sequence: the head has a chunk for every few thousand.

The output head is measured with a vocabulary of a few tokens, that is, without its logits: its GPU kernels are
compiled and cannot be traced here. `scmdm.planner.rank_memory` adds logits and gradients of the head.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.model import DENOISERS, ModelConfig
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import NoisedBatch
from scmdm.distributed.engine import compute_context
from scmdm.models.attention import FLEX_BACKENDS, NO_MASKS
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.experts.expert_block import ExpertMixture
from scmdm.models.experts.expert_parallel import ExpertGroup
from scmdm.models.linear import multiply_in_fp8
from scmdm.models.lora import is_added
from scmdm.models.model_files import ModelSpec
from scmdm.models.network import Network
from scmdm.torch_private import TorchDispatchMode, fake_tensors, storage_id, tree_leaves

_LAYERS = (2, 3)  # a single layer is atypical: it is both first and last in the backward pass
_VOCABULARY = 8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ActivationBytes:
    """Peak bytes by phase of a step, without weights, the head's logits, and the gradients of all blocks but one."""

    estimate_blocks: int  # in the blocks of the passes that compute the estimate
    estimate_head: int  # from the output layer of such a pass to the next pass
    loss_blocks: int  # in the blocks of the pass that computes the loss
    loss_head: int  # from the output layer of that pass to the loss
    kept: int  # kept for the backward pass
    backward: int  # in the backward pass, with the weight gradients of one block
    kept_by_block: int = 0  # part of `kept` that each block adds

    def extrapolate(self, at: int, more: ActivationBytes, more_at: int, wanted: int) -> ActivationBytes:
        """Extrapolate to the number `wanted` of what `self` has `at` of and `more` has `more_at` of."""
        pairs = zip(astuple(self), astuple(more), strict=True)
        return ActivationBytes(*(one + (wanted - at) * (other - one) // (more_at - at) for one, other in pairs))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators create while the mode is on, until they are freed.

    Attributes:
        live: Current bytes.
        peak: Peak bytes; assign `live` to start a new interval.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, gpu: bool = False) -> None:
        """Exclude the storages of `known`; `gpu` counts a byte per element of a dropout mask, as CUDA stores it."""
        super().__init__()
        self.live = self.peak = 0
        self._gpu = gpu
        self._sizes: dict[int, int] = {}
        self._known = {storage_id(tensor.untyped_storage()): tensor for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.track(tensor.untyped_storage())
        if self._gpu and function is torch.ops.aten.bernoulli_.float:
            self.resize(storage_id(result.untyped_storage()), result.numel())
        return result

    def track(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = storage_id(storage)
        if key not in self._sizes and key not in self._known:
            self.resize(key, storage.nbytes())
            weakref.finalize(storage, self.resize, key, 0)

    def follows(self, key: int) -> bool:
        """Return whether a storage is counted, by its `storage_id`."""
        return key in self._sizes

    def resize(self, key: int, size: int) -> None:
        """Set the size in bytes of a storage, by its `storage_id`."""
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        if not size:
            del self._sizes[key]
        self.peak = max(self.peak, self.live)


class _EverythingMasked(TorchDispatchMode):
    """Makes `nonzero` return every element, because its output has no known shape for fake tensors."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return function(*args, **(kwargs or {}))


def measure_activations(
    model: ModelConfig,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
    gathered: bool,
    passes: int,
    trained_layers: int | None,
    gpu: bool,
    block_length: int | None = None,
    shared_layers: int = 0,
    experts: int = 1,
) -> ActivationBytes:
    """Measure one micro-batch of `rows` sequences of `length` tokens, all of them masked.

    `dtype` is the dtype of compute. With `gathered` weights arrive in that dtype, as FSDP2 gathers them; otherwise they
    are float32 and autocast copies them. `passes` passes compute the estimate (0: vanilla training).
    `trained_layers` is that of `scmdm.models.flops.step_flops`. A model of blocks of `block_length` evaluates two
    copies of each sequence, with a dense mask where FlexAttention does not run. The first `shared_layers` blocks run
    before the passes that compute the estimate, which keep their activations. `experts` ranks share the experts of each
    layer, with balanced loads.
    """
    masked = block_length is not None and not (gpu and model.attention in FLEX_BACKENDS)
    # The kernels that `auto` selects on a CPU for short sequences keep probabilities; GPUs have fused attention.
    model = dataclasses.replace(model, compile="none", attention="sdpa" if gpu else model.attention)
    dense = _dense(model)
    model_json = json.dumps(asdict(dataclasses.replace(model, layers=0, inject_layer=0)) | dense)
    # In each of them two blocks with experts at least, if there are any: the first one is both first and last, too.
    few_layers, more_layers = (layers + sum(dense.values()) for layers in _LAYERS)

    def measured(rows: int, length: int) -> ActivationBytes:
        options = (rows, length, dtype, gathered, min(passes, 2), trained_layers, gpu, block_length, masked, experts)
        fewer, more = (_measure(model_json, layers, *options) for layers in (few_layers, more_layers))
        found = fewer.extrapolate(few_layers, more, more_layers, model.layers)
        by_block = (more.kept - fewer.kept) // (more_layers - few_layers)
        shared = shared_layers * by_block if passes else 0
        return dataclasses.replace(
            found,
            estimate_blocks=found.estimate_blocks + shared,
            estimate_head=found.estimate_head + shared,
            kept_by_block=by_block,
        )

    # Dense masks, and probabilities of a CPU's kernels, grow with the square of the length.
    positions, few = rows * length, _linear_from(model)
    if masked or not gpu or positions <= 3 * few:
        return measured(rows, length)
    return measured(1, few).extrapolate(few, measured(1, 2 * few), 2 * few, positions)


def _dense(model: ModelConfig) -> dict[str, int]:
    """One block without experts at most, so that each further block has experts, as most of a model's do."""
    return {"dense_layers": min(1, model.dense_layers)} if isinstance(model, DecoderConfig) else {}


def _linear_from(model: ModelConfig) -> int:
    """Return a number of positions from which on activations, not weights or a chunk of the head, make every peak."""
    return max(2 * model.head_chunk, model.block_matrix_elements() // (2 * model.width))


@functools.cache
def _measure(
    model_json: str,
    layers: int,
    rows: int,
    length: int,
    dtype: torch.dtype,
    gathered: bool,
    passes: int,
    trained_layers: int | None,
    gpu: bool,
    block_length: int | None,
    masked: bool,
    experts: int,
) -> ActivationBytes:
    keys = {**json.loads(model_json), "layers": layers}
    config = DENOISERS.schema(keys["kind"])(**keys)
    diffusion, classes = DiffusionConfig(block_length=block_length), 2 if config.labels else 0
    spec = ModelSpec(config, diffusion, _VOCABULARY, _VOCABULARY - 1, length, classes=classes)
    model = spec.build().train()
    for mixture in (one for one in model.modules() if experts > 1 and isinstance(one, ExpertMixture)):
        mixture.share_experts(_PretendedGroup(experts), None)
    if not masked:
        model._masks = lambda state: NO_MASKS  # type: ignore[method-assign]
    if config.matmul_precision == "fp8":
        multiply_in_fp8(model.blocks, emulated=False)
    with fake_tensors():
        _make_fake(model, dtype if gathered else torch.float32)
        _freeze(model, trained_layers)
        tracker = LiveBytes([*model.parameters(), *model.buffers()], gpu=gpu)
        batch = _masked_batch(rows, length, labels=config.labels, blocks=block_length is not None)
        peaks: list[int] = []

        def next_interval(*_: Any) -> None:
            peaks.append(tracker.peak)
            tracker.peak = tracker.live

        hooks = [
            model.blocks[0].register_forward_pre_hook(next_interval),
            model.output_layer.register_forward_hook(next_interval),
        ]
        with _EverythingMasked(), tracker:
            with compute_context(_CPU, dtype):
                loss = self_conditioned_nelbo(
                    model, batch, spec.schedule, condition=passes > 0, passes=max(1, passes)
                ).loss
            next_interval()
            for hook in hooks:  # recomputation would call them
                hook.remove()
            kept, tracker.peak = tracker.live, tracker.live
            loss.backward()
        return _by_phase(peaks, passes, kept, tracker.peak)


class _PretendedGroup(ExpertGroup):
    """Ranks that send as much as they receive; fake tensors have no values to send."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.rank = ranks, 0

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Do nothing: buffers exist."""


def _by_phase(peaks: list[int], passes: int, kept: int, backward: int) -> ActivationBytes:
    """Assign peaks to phases; `peaks` starts with the embedding, then has blocks and head of each pass."""
    blocks, heads = peaks[1::2], peaks[2::2]
    assert len(blocks) == len(heads) == passes + 1
    estimate_blocks, estimate_head = max(blocks[:-1], default=0), max(heads[:-1], default=0)
    return ActivationBytes(estimate_blocks, estimate_head, blocks[-1], heads[-1], kept, backward)


def _make_fake(model: Network, dtype: torch.dtype) -> None:
    """Replace parameters and buffers of a model on the meta device by fake tensors on the CPU."""
    rest = torch.float32 if model.config.head_precision == "float32" else dtype
    gradients = _BlockGradients()
    for path, module in model.named_modules():
        own = dtype if path.startswith("blocks.") else rest
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=own))
            fake.register_post_accumulate_grad_hook(gradients.make_hook(path))
            module._parameters[name] = fake
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _BlockGradients:
    """Keeps the weight gradients of one block at a time, as FSDP2 does, which reduces them block by block."""

    def __init__(self) -> None:
        self._block, self._parameters = "", list[Tensor]()

    def make_hook(self, path: str) -> Callable[[Tensor], None]:
        """Make the post-accumulate hook for a parameter of the module at `path`."""
        block = ".".join(path.split(".")[:2]) if path.startswith("blocks.") else "rest"

        def hook(parameter: Tensor) -> None:
            if block != self._block:
                for earlier in self._parameters:
                    earlier.grad = None
                self._block, self._parameters = block, []
            self._parameters.append(parameter)

        return hook


def _freeze(model: nn.Module, trained_layers: int | None) -> None:
    """Freeze the parameters that a run with adapters or `train.last_layers` does not train."""
    if trained_layers is None:
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name) or (trained_layers > 0 and name.startswith("blocks.")))


def _masked_batch(rows: int, length: int, *, labels: bool, blocks: bool) -> NoisedBatch:
    """Return a batch in which every position is masked, which needs the most memory."""
    x = torch.zeros((rows, length), dtype=torch.int64)
    z, t = torch.full_like(x, _VOCABULARY - 1), torch.ones(rows, dtype=torch.float64)
    conditioned = torch.ones(rows, dtype=torch.bool)
    classes = torch.zeros(rows, dtype=torch.int64) if labels else None
    block_t = t[:, None].expand(x.shape) if blocks else None
    valid = torch.ones_like(x, dtype=torch.bool)
    return NoisedBatch(x, z, t, valid, conditioned, labels=classes, block_t=block_t)
