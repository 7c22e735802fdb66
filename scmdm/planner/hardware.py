"""GPUs and their interconnects: vendors' figures, in bytes, operations and seconds.

Sources: products per second in bfloat16 and FP8 are those of `scmdm.models.flops`; memory, its bandwidth, float32 and
NVLink are from NVIDIA's data sheets of H100 (SXM5), H200, A100 (80 GB SXM), B200 and L40S; the network is that of
NVIDIA's DGX reference designs: one adapter per GPU, 200 Gb/s (A100) or 400 Gb/s. L40S has no NVLink: its link is PCIe
4.0 x16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from scmdm.errors import UserError
from scmdm.models.flops import PEAK_FLOPS, PEAK_FP8_FLOPS

_GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """Nominal figures of a GPU."""

    name: str
    memory: float  # bytes that a process can use: the nominal size, less about 1 % that the driver keeps
    bfloat16_flops: float  # dense products a second
    fp8_flops: float | None  # likewise; None: it has no products in FP8
    float32_flops: float  # without TensorFloat-32, which scmdm does not switch on
    memory_bandwidth: float  # bytes/s
    link: float  # bytes/s in one direction to the other GPUs of the node
    network: float  # bytes/s in one direction to other nodes, per GPU
    host_link: float  # bytes/s in one direction to host memory

    def flops(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s of matrix products in `dtype`."""
        return self.bfloat16_flops if dtype == torch.bfloat16 else self.float32_flops


def _gpu(name: str, memory_gib: float, float32: float, hbm: float, link: float, network: float, host: float) -> Gpu:
    usable = memory_gib * 2**30
    bandwidths = (x * _GB for x in (hbm, link, network, host))
    own = name.upper()
    return Gpu(name, usable, PEAK_FLOPS[own], PEAK_FP8_FLOPS.get(own), float32 * 1e12, *bandwidths)


#            name    GiB  TFLOP/s   GB/s: memory, link, network, host
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", 79.1, 67, 3350, 450, 50, 64),
        _gpu("h200", 139.8, 67, 4800, 450, 50, 64),
        _gpu("a100", 79.1, 19.5, 2039, 300, 25, 32),
        _gpu("b200", 178.0, 75, 7700, 900, 50, 64),
        _gpu("l40s", 44.5, 91.6, 864, 32, 25, 32),
    )
}


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `gpus_per_node` GPUs each; ranks are numbered node by node, as torchrun does."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


def make_cluster(gpu: str, nodes: int, gpus_per_node: int) -> Cluster:
    """Make a cluster. Raises UserError for an unlisted GPU or a number out of range."""
    if gpu.lower() not in GPUS:
        raise UserError(f"--gpu {gpu} is not known; it must be one of {', '.join(GPUS)}")
    for flag, number in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if not 1 <= number <= 2**20:
            raise UserError(f"{flag} {number} is not possible; it must be between 1 and {2**20}")
    return Cluster(GPUS[gpu.lower()], nodes, gpus_per_node)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan, which are printed with it."""

    efficiency: float | None = None  # fraction of peak FLOP/s without communication; None: `measured_efficiency`
    # Fraction of the links' nominal bandwidth. ASTRA-sim's validation on HGX H100 measured at most 741 of 900 GB/s in
    # both directions (astra-sim.github.io, "NCCL over HGX-H100 Systems").
    link_efficiency: float = 0.8
    memory_efficiency: float = 0.8  # fraction of the memory's nominal bandwidth in the optimizer's update
    host_bandwidth: float = 50e9  # bytes/s of host memory per rank, for the update under fsdp.offload
    # NCCL's own cost model (src/graph/tuning.cc), ring, protocol Simple: seconds per collective, and per step of the
    # ring within a node and between nodes.
    base_latency: float = 8.4e-6
    link_latency: float = 3.4e-6
    network_latency: float = 14e-6
    # Fraction of the GPU's memory kept free for CUDA's context, NCCL's buffers, cuBLAS' workspaces and fragmentation.
    memory_reserve: float = 0.1

    def product_efficiency(self, width: int) -> float:
        """Achieved fraction of peak FLOP/s for a model of this width."""
        return measured_efficiency(width) if self.efficiency is None else self.efficiency


# Width and fraction of peak FLOP/s, without the update: scmdm's compiled steps of 170M and of a billion parameters on
# an H100 (docs/lab/2026-11-26-h100.md). torchtitan's 8B reaches 0.33 to 0.39 with communication, MosaicML's 1.3B 0.42.
_MEASURED = ((768, 0.36), (2048, 0.52))


def measured_efficiency(width: int) -> float:
    """Fraction of peak FLOP/s, interpolated in the logarithm of the width and constant outside the measurements."""
    (narrow, low), (wide, high) = _MEASURED
    part = math.log(width / narrow) / math.log(wide / narrow)
    return low + (high - low) * min(1.0, max(0.0, part))


def make_assumptions(efficiency: float | None = None) -> Assumptions:
    """Make the assumptions; `efficiency` is a fraction of peak FLOP/s. Raises UserError unless it is in (0, 1]."""
    if efficiency is not None and not 0 < efficiency <= 1:
        raise UserError(f"--efficiency {efficiency} is not possible; it must be above 0 and at most 1")
    return Assumptions(efficiency=efficiency)
