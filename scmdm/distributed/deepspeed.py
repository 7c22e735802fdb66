"""DeepSpeed engine: ZeRO stages 1 to 3, with the same losses, EMA and checkpoints as the other engines.

Differences of DeepSpeed, and how the engine handles them:

- DeepSpeed averages gradients over the ranks. The loss is already divided by the valid tokens of the global batch, so
  it is multiplied by the number of ranks first. Micro-batches are summed: DeepSpeed is told not to divide them.
- DeepSpeed hooks `forward`, while the model's entry points are other methods: it wraps the module `_EntryPoints`.
- DeepSpeed stores float32 weights and moments as flat fragments that may begin within a row. EMA uses the same
  fragments (`Fragment`). Checkpoints hold rows: `pack` and `unpack` exchange the elements at the borders, and no rank
  ever holds a whole parameter.
- DeepSpeed divides a model that every rank has allocated, and broadcasts its weights. For stage 3 the model is built on
  the meta device, `shard_rows` gives each rank rows of it, as FSDP2 does, to fill, and `partition` makes DeepSpeed's
  partitions of them (`deepspeed.zero.Init`).
- DeepSpeed's `step` measures the norm, clips and updates at once, so all of it happens in `clip_grad_norm`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from scmdm.config.run import RunConfig
from scmdm.diffusion.state import State
from scmdm.distributed.element_exchange import Move, exchange, range_bounds, row_bounds
from scmdm.distributed.engine import MOMENTS, ParallelEngine
from scmdm.errors import UserError
from scmdm.models.linear import Linear
from scmdm.models.network import Network
from scmdm.models.tensor_files import local_part
from scmdm.system.process_group import destroy_with


def deepspeed_json(config: RunConfig, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration, without optimizer and schedule, which scmdm provides."""
    train = config.train
    zero: dict[str, Any] = {"stage": config.deepspeed.stage}
    if config.deepspeed.stage == 3:
        zero["stage3_param_persistence_threshold"] = config.deepspeed.param_persistence_threshold
        if config.self_conditioning.rate > 0:
            # Prefetching follows the trace of the previous pass, but the two passes run different modules.
            zero["stage3_prefetch_bucket_size"] = 0
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (world_size * train.micro_batch_size),
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        # Not "bf16", which would round the float32 weights that an adaptation starts from.
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": str(torch.bfloat16),
            "lower_precision_safe_modules": ["torch.nn.Linear", f"{Linear.__module__}.{Linear.__qualname__}"],
        },
        "timers": {"throughput": {"enabled": False}},
    }


def require_deepspeed() -> None:
    """Raise UserError if DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "engine=deepspeed needs DeepSpeed, which is not installed; run `pip install -c constraints.txt "
            "-e '.[deepspeed]'`, or set engine=fsdp2"
        )


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for the run's device, without its log messages."""
    require_deepspeed()
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")  # one process without torchrun
    import deepspeed

    # Otherwise DeepSpeed compiles a collective for inference on CPUs, with any compiler that it finds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed uses deprecated names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return deepspeed


def _join_group(deepspeed: Any) -> None:
    """Let DeepSpeed take over the group of torch.distributed, and forget its own groups when that one is destroyed."""
    deepspeed.init_distributed()
    destroy_with(deepspeed.comm.destroy_process_group)


def shard_rows(model: nn.Module, device: torch.device) -> None:
    """Replace the parameters of a model on the meta device by rows of them (DTensor), still without memory."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            bounds, row = row_bounds(parameter.shape, mesh.size()), parameter[0].numel()
            rows = (bounds[mesh.get_rank() + 1] - bounds[mesh.get_rank()]) // row
            local = parameter.detach().new_empty(rows, *parameter.shape[1:])
            setattr(module, name, nn.Parameter(_as_rows(local, parameter, mesh), parameter.requires_grad))


def partition(model: nn.Module, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Convert a model that `shard_rows` has sharded, and that was filled, to partitions of ZeRO stage 3."""
    deepspeed, ranks = _import_deepspeed(device), dist.get_world_size()
    _join_group(deepspeed)
    # An empty module, because `Init` would allocate and broadcast the parameters of a whole one.
    context = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=deepspeed_json(config, ranks, dtype))
    own = [(module, *named) for module in model.modules() for named in module.named_parameters(recurse=False)]
    rows = [parameter.detach() for _, _, parameter in own]
    moves = [
        Move(row_bounds(value.shape, ranks), range_bounds(value.numel(), -(-value.numel() // ranks), ranks))
        for value in rows
    ]
    parts = exchange([local_part(value).flatten() for value in rows], moves)
    for (module, name, parameter), part in zip(own, parts, strict=True):
        setattr(module, name, _partitioned(context, parameter, part))


def _partitioned(context: Any, parameter: nn.Parameter, part: Tensor) -> nn.Parameter:
    """Return a parameter of stage 3 with this rank's part. It is never whole: a view of one element has its shape."""
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    made: Any = nn.Parameter(part.new_zeros(1).expand(parameter.shape), parameter.requires_grad)
    context._convert_to_deepspeed_param(made)
    made.ds_numel_aligned = context._aligned_size(made)
    padded: Any = part.new_zeros(made.ds_numel_aligned // dist.get_world_size())
    padded[: len(part)] = part
    padded.ds_numel, padded.status, padded.final_location = len(padded), PartitionedParamStatus.AVAILABLE, None
    made.ds_tensor = padded
    made.partition()  # with a `ds_tensor`, this only frees the parameter
    return made


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: a range of its elements, with float32 weights and moments.

    The tensors are flat views of the memory that DeepSpeed updates, empty if the rank has no part.
    """

    shape: torch.Size  # of the whole parameter
    bounds: list[int]  # of all ranks' ranges, see `element_exchange`
    weights: Tensor
    moments: dict[str, Tensor]


class DeepspeedEngine(ParallelEngine):
    """Engine that wraps DeepSpeed's engine."""

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype,
        config: RunConfig,
    ) -> None:
        super().__init__(model, optimizer, device, dtype)
        if config.deepspeed.stage == 3 and dtype != torch.float32 and model.config.head_precision == "float32":
            raise UserError(
                "model.head_precision=float32 is not possible with deepspeed.stage=3 and precision=bfloat16, which "
                "gathers weights in bfloat16; use head_precision=compute, stage 1 or 2, or precision=float32"
            )
        deepspeed = _import_deepspeed(device)
        _join_group(deepspeed)
        self._stage, self._clip = config.deepspeed.stage, config.optimizer.clip
        entry = _EntryPoints(model)
        self._deepspeed, self._zero, _, _ = deepspeed.initialize(
            model=entry, optimizer=optimizer, config=deepspeed_json(config, self.world_size, dtype)
        )
        if self._stage == 3:
            for parameter in dict.fromkeys((model.vocab_embed.embedding, *model.head())):  # a tied head only once
                if parameter is not None:
                    deepspeed.zero.register_external_parameter(entry, parameter)
        self.denoiser = _Denoiser(self._deepspeed, model.inject_layer)
        self._fragments = self._find_fragments()
        self._mesh = init_device_mesh(device.type, (self.world_size,))

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        """Return a null context: DeepSpeed's forward has its own autocast."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss * self.world_size, scale_wrt_gas=False)

    def clip_grad_norm(self, limit: float, skip: Tensor | None = None) -> Tensor:
        """Measure, clip and also update. If `skip` is true or the norm is not finite, do not update and return NaN."""
        assert limit == self._clip
        norm = float("nan")
        if skip is None or not skip:
            self._deepspeed.step()
            norm = float(self._deepspeed.get_global_grad_norm()) if self._deepspeed.was_step_applied() else norm
        return torch.tensor(norm, device=self.device)

    def step(self, skip: Tensor) -> None:
        """Do nothing: `clip_grad_norm` has updated the parameters."""

    def parameters(self) -> dict[str, Tensor]:
        """Return the flat fragments of the float32 weights."""
        return {name: fragment.weights for name, fragment in self._fragments.items()}

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        if self._stage == 3:
            self._deepspeed.empty_partition_cache()  # gathered parameters kept for the next pass
        super().load_parameters(parameters)
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        parameter: Any  # DeepSpeed adds attributes
        for parameter in self.trained.values():
            parameter.ds_tensor.data.copy_(_local(parameter))

    def moments(self) -> dict[str, dict[str, Tensor]]:
        return {kind: {name: part.moments[kind] for name, part in self._fragments.items()} for kind in MOMENTS}

    def pack(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's rows of each tensor, of whose elements it receives those that it does not hold.

        Rows that it holds are views.
        """
        fragments = [self._fragments[name] for name in values]
        rows = exchange(list(values.values()), [self._move_to_rows(fragment) for fragment in fragments])
        return {
            name: _as_rows(part.view(-1, *one.shape[1:]), torch.empty(one.shape, device="meta"), self._mesh)
            for name, one, part in zip(values, fragments, rows, strict=True)
        }

    def unpack(self, packed: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        rows = [packed[name] for name in values]
        moves = [self._move_to_rows(self._fragments[name]).back() for name in values]
        held = [local_part(value).flatten() for value in rows]
        for value, part in zip(values.values(), exchange(held, moves), strict=True):
            value.copy_(part)

    def _move_to_rows(self, fragment: Fragment) -> Move:
        return Move(fragment.bounds, row_bounds(fragment.shape, self.world_size))

    def _find_fragments(self) -> dict[str, Fragment]:
        """Locate the fragments in DeepSpeed's memory, and create the moments, as its first step would."""
        flat = (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        for group in flat:
            state = self.optimizer.state[group]
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
            state.update({kind: torch.zeros_like(group, requires_grad=False) for kind in MOMENTS})
        if self._stage == 3:
            return {name: self._fragment_of_stage_3(parameter) for name, parameter in self.trained.items()}
        return {name: self._fragment_of_stages_1_and_2(parameter) for name, parameter in self.trained.items()}

    def _fragment_of_stages_1_and_2(self, parameter: Any) -> Fragment:
        """Locate a fragment: stages 1 and 2 concatenate the parameters of a group and give each rank a range."""
        flat = next(one for one in self._zero.bit16_groups_flat if _shares_memory(one, parameter))
        offset = parameter.data.storage_offset() - flat.storage_offset()
        bounds = range_bounds(parameter.numel(), flat.numel() // self.world_size, self.world_size, offset=offset)
        place = parameter._hp_mapping
        if place is None:
            empty = torch.empty(0, device=self.device)
            found = Fragment(parameter.shape, bounds, empty, {kind: empty.clone() for kind in MOMENTS})
        else:
            group = self._zero.single_partition_of_fp32_groups[place.param_group_index]
            where = place.hp_fragment_address
            moments = {kind: self.optimizer.state[group][kind].narrow(0, where.start, where.numel) for kind in MOMENTS}
            found = Fragment(parameter.shape, bounds, place.hp_fragment.detach(), moments)
            assert place.lp_fragment_address.start == bounds[self.rank]
        assert len(found.weights) == bounds[self.rank + 1] - bounds[self.rank]
        return found

    def _fragment_of_stage_3(self, parameter: Any) -> Fragment:
        """Locate a fragment: stage 3 pads every parameter and divides it into one part per rank."""
        bounds = range_bounds(parameter.ds_numel, len(_local(parameter)), self.world_size)
        size = bounds[self.rank + 1] - bounds[self.rank]
        moments = {kind: _local(parameter, kind)[:size] for kind in MOMENTS}
        return Fragment(parameter.ds_shape, bounds, _local(parameter)[:size], moments)


class _EntryPoints(nn.Module):
    """Module for DeepSpeed to wrap, whose `forward` calls a method of the model by name.

    Arguments are passed by keyword, because DeepSpeed does not change those.
    """

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, method: str, **arguments: Any) -> Any:
        return getattr(self.model, method)(**arguments)


class _Denoiser:
    """Denoiser that calls the model through DeepSpeed's engine."""

    def __init__(self, deepspeed: Any, inject_layer: int) -> None:
        self._deepspeed, self._inject_layer = deepspeed, inject_layer

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        if not self._inject_layer:
            return None
        return self._deepspeed(method="lower", state=state, dropout=dropout)

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        return self._deepspeed(method="estimate", state=state, dropout=dropout)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        return self._deepspeed(method="weighted_nll", state=state, x_BL=x_BL, weight_BL=weight_BL)


def _local(parameter: nn.Parameter, kind: str | None = None) -> Tensor:
    """Return stage 3's flat, padded view of this rank's part of a parameter's float32 weights, or of a moment."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    found = safe_get_local_fp32_param(parameter) if kind is None else safe_get_local_optimizer_state(parameter, kind)
    return found.detach()


def _shares_memory(flat: Tensor, parameter: Tensor) -> bool:
    return flat.untyped_storage().data_ptr() == parameter.data.untyped_storage().data_ptr()


def _as_rows(local: Tensor, whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return this rank's rows as a DTensor of the shape of `whole`."""
    return DTensor.from_local(local, mesh, (Shard(0),), run_check=False, shape=whole.shape, stride=whole.stride())
