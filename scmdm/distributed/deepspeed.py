"""DeepSpeed engine: ZeRO stages 1 to 3, with the same losses, EMA and checkpoints as the other engines.

Differences of DeepSpeed, and how the engine handles them:

- DeepSpeed averages gradients over the ranks. The loss is already divided by the valid tokens of the global batch, so
  it is multiplied by the number of ranks first. Micro-batches are summed: DeepSpeed is told not to divide them.
- DeepSpeed hooks `forward`, while the model's entry points are other methods: it wraps the module `_EntryPoints`.
- DeepSpeed stores float32 weights and moments as flat fragments that may begin within a row. EMA uses the same
  fragments (`Fragment`); `pack` converts them to the parameters' shapes for checkpoints.
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
from scmdm.distributed.engine import MOMENTS, ParallelEngine
from scmdm.errors import UserError
from scmdm.models.linear import Linear
from scmdm.models.network import Network


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
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # deprecated names in DeepSpeed
    return deepspeed


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: a range of its elements, with float32 weights and moments.

    The tensors are flat views of the memory that DeepSpeed updates, empty if the rank has no part.
    """

    shape: torch.Size  # of the whole parameter
    start: int
    weights: Tensor
    moments: dict[str, Tensor]

    def gather(self, values: Tensor) -> Tensor:
        """Assemble the whole parameter, average or moment from the parts of all ranks."""
        whole = torch.zeros(self.shape.numel(), dtype=values.dtype, device=values.device)
        self.part_of(whole).copy_(values)
        dist.all_reduce(whole)
        return whole.view(self.shape)

    def part_of(self, whole: Tensor) -> Tensor:
        """Return a view of this rank's part of a whole parameter."""
        return whole.view(-1).narrow(0, self.start, len(self.weights))


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
        self._stage, self._clip = config.deepspeed.stage, config.optimizer.clip
        entry = _EntryPoints(model)
        self._deepspeed, self._zero, _, _ = deepspeed.initialize(
            model=entry, optimizer=optimizer, config=deepspeed_json(config, self.world_size, dtype)
        )
        if self._stage == 3:
            for parameter in dict.fromkeys((model.vocab_embed.embedding, *model.head())):  # a tied head only once
                if parameter is not None:
                    deepspeed.zero.register_external_parameter(entry, parameter)
        self.denoiser = _Denoiser(self._deepspeed)
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
        """Assemble whole parameters one at a time, and keep this rank's rows of each."""
        return {name: _rows(self._fragments[name].gather(value), self._mesh) for name, value in values.items()}

    def unpack(self, packed: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            rows = packed[name]
            assert isinstance(rows, DTensor)
            value.copy_(self._fragments[name].part_of(rows.full_tensor()))

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
        place = parameter._hp_mapping
        if place is None:
            empty = torch.empty(0, device=self.device)
            return Fragment(parameter.shape, 0, empty, {kind: empty.clone() for kind in MOMENTS})
        group = self._zero.single_partition_of_fp32_groups[place.param_group_index]
        where = place.hp_fragment_address
        moments = {kind: self.optimizer.state[group][kind].narrow(0, where.start, where.numel) for kind in MOMENTS}
        return Fragment(parameter.shape, place.lp_fragment_address.start, place.hp_fragment.detach(), moments)

    def _fragment_of_stage_3(self, parameter: Any) -> Fragment:
        """Locate a fragment: stage 3 pads every parameter and divides it into one part per rank."""
        padded = len(_local(parameter))
        start = min(self.rank * padded, parameter.ds_numel)
        size = min(padded, parameter.ds_numel - start)
        moments = {kind: _local(parameter, kind)[:size] for kind in MOMENTS}
        return Fragment(parameter.ds_shape, start, _local(parameter)[:size], moments)


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

    def __init__(self, deepspeed: Any) -> None:
        self._deepspeed = deepspeed

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        return self._deepspeed(method="estimate", state=state, dropout=dropout)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        return self._deepspeed(method="weighted_nll", state=state, x_BL=x_BL, weight_BL=weight_BL)


def _local(parameter: nn.Parameter, kind: str | None = None) -> Tensor:
    """Return stage 3's flat, padded view of this rank's part of a parameter's float32 weights, or of a moment."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    found = safe_get_local_fp32_param(parameter) if kind is None else safe_get_local_optimizer_state(parameter, kind)
    return found.detach()


def _rows(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return this rank's rows of a tensor that all ranks hold, copied so that the rest can be freed."""
    parts = whole.chunk(mesh.size())
    mine = parts[mesh.get_rank()].clone() if mesh.get_rank() < len(parts) else whole.new_empty(0, *whole.shape[1:])
    return DTensor.from_local(mine, mesh, (Shard(0),), run_check=False, shape=whole.shape, stride=whole.stride())
