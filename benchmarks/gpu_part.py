"""One part of `python -m benchmarks gpu`, as a process: `python -m benchmarks.gpu_part NAME FILE [--tiny]`."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, blocks
from benchmarks.counting import peak_memory
from benchmarks.step import BILLION_GPU, SMALL_GPU, Shape, make_engine_step
from benchmarks.timing import Timing, interleave
from scmdm.diffusion.guidance import SamplingDenoiser
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import Samples, sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.distributed.engine import compute_context, resolve_device, resolve_precision
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.flops import peak_flops, step_flops
from scmdm.models.initialization import init_weights
from scmdm.ops.cuda_graphs import ReplayedDenoiser
from scmdm.ops.fp8 import fp8_unusable_because
from scmdm.system.files import atomic_write_text

_TINY = Shape("tiny", DiTConfig(width=32, layers=1, heads=2), 40, 16, 4, 2)
_SAMPLER_STEPS, _SAMPLER_BATCH = 128, 16
_BLOCK, _STEPS_OF_BLOCK = 32, 2


class AbsentError(Exception):
    """What a part would measure does not exist in this version."""


def step_170m(tiny: bool) -> dict[str, Any]:
    """Vanilla and adaptation steps of MDLM's size."""
    return _steps(_TINY if tiny else SMALL_GPU)


def step_1b(tiny: bool) -> dict[str, Any]:
    """Vanilla and adaptation steps of a billion parameters."""
    return _steps(_TINY if tiny else BILLION_GPU)


def residual_1b(tiny: bool) -> dict[str, Any]:
    """Adaptation steps of a billion parameters with the residual stream in bfloat16."""
    return _switched(tiny, residual_precision="compute")


def fp8_1b(tiny: bool) -> dict[str, Any]:
    """Adaptation steps of a billion parameters with the products of linear maps in FP8; a CPU emulates them."""
    if torch.cuda.is_available():
        device = resolve_device("auto")
        if (reason := fp8_unusable_because(device, resolve_precision("auto", device))) is not None:
            raise AbsentError(reason)
    return _switched(tiny, matmul_precision="fp8")


def trunk_1b(tiny: bool) -> dict[str, Any]:
    """Adaptation steps of a billion parameters whose blocks are compiled as one graph; a rehearsal compiles nothing."""
    return _switched(tiny, compile="none" if tiny else "trunk")


def samplers(tiny: bool) -> dict[str, Any]:
    """A sample of MDLM's size without and with the carried estimate, and with CUDA graphs."""
    shape = _TINY if tiny else SMALL_GPU
    steps, batch = (4, 2) if tiny else (_SAMPLER_STEPS, _SAMPLER_BATCH)
    config = replace(shape.model, self_conditioned=True)
    device = resolve_device("auto")
    dtype = resolve_precision("auto", device)
    model = DiT(config, vocab_size=shape.vocab, mask_id=shape.vocab - 1, schedule=LogLinear()).to(device).eval()
    init_weights(model, 0)
    start = torch.full((batch, shape.length), shape.vocab - 1, device=device)
    ids = torch.arange(batch, device=device)

    def run(denoiser: SamplingDenoiser, *, carry: bool) -> Callable[[], object]:
        settings = SamplerSettings(steps=steps, carry=carry)
        mask_id = shape.vocab - 1
        return lambda: sample(denoiser, start, ids, schedule=LogLinear(), settings=settings, mask_id=mask_id, seed=0)

    functions = {"vanilla": run(model, carry=False), "self-conditioned": run(model, carry=True)}
    if device.type == "cuda":
        functions["self-conditioned, CUDA graphs"] = run(ReplayedDenoiser(model), carry=True)
    with compute_context(device, dtype):
        timings = interleave(functions, warmup=1, rounds=2)
    made = {name: batch / statistics.median(timing.wall) for name, timing in timings.items()}
    settings = {"steps": steps, "batch": batch, "precision": str(dtype), "shape": _described(shape)}
    return {"config": settings, "rounds": _rounds(timings), "samples_per_s": made}


def block_cache(tiny: bool) -> dict[str, Any]:
    """Samples of a model of blocks of MDLM's size with whole evaluations, and with cached keys and values."""
    shape = _TINY if tiny else SMALL_GPU
    block, batch = (4, 2) if tiny else (_BLOCK, _SAMPLER_BATCH)
    # One kernel for both: FlexAttention would compile for longer than this part may take.
    shape = replace(shape, model=replace(shape.model, self_conditioned=True, attention="sdpa"))
    device = resolve_device("auto")
    model = blocks.make_model(device, shape.model, shape.vocab)
    model.block_length = block
    steps = _STEPS_OF_BLOCK * shape.length // block
    plain = SamplerSettings(
        kind="confidence", temperature=0.0, steps=steps, block_length=block, model_of_blocks=True, carry=True
    )
    start = torch.full((batch, shape.length), shape.vocab - 1, device=device)
    drawn: dict[str, Samples] = {}

    def run(cache: str) -> None:
        drawn[cache] = sample(
            model,
            start,
            torch.arange(batch, device=device),
            schedule=LogLinear(),
            settings=replace(plain, cache=cache),
            mask_id=shape.vocab - 1,
            seed=0,
        )

    with compute_context(device, resolve_precision("auto", device)):
        timings = interleave({cache: partial(run, cache) for cache in ("none", "blocks")}, warmup=1, rounds=2)
    settings = {"steps": steps, "block_length": block, "batch": batch, "precision": _precision()}
    return {
        "config": {**settings, "shape": _described(shape)},
        "rounds": _rounds(timings),
        "samples_per_s": {name: batch / statistics.median(timing.wall) for name, timing in timings.items()},
        "positions": {cache: int(own.positions_B.sum()) for cache, own in drawn.items()},
        "equal_tokens": float((drawn["blocks"].tokens == drawn["none"].tokens).double().mean()),
    }


def attention_kernels(tiny: bool) -> dict[str, Any]:
    """Attention, forward and backward, by kernel."""
    gpu = torch.cuda.is_available()
    shapes = ((2, 16, 2, 8),) if tiny else attention.GPU_SHAPES if gpu else attention.SHAPES
    found = attention.measure(shapes)
    return {"config": {"shapes_BLHK": shapes}, **{title: _rounds(timings) for title, timings in found.items()}}


def gpu_tests(tiny: bool) -> dict[str, Any]:
    """The tests that need a GPU; a rehearsal collects one file of them."""
    place = "tests/runtime/test_flight_recorder.py" if tiny else "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", place]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}:\n" + "\n".join(lines[-40:]))
    return {"config": {"command": command[1:]}, "status": done.returncode, "summary": lines[-8:]}


PARTS: dict[str, tuple[Callable[[bool], dict[str, Any]], int]] = {  # with its limit in seconds
    "tests": (gpu_tests, 120),
    "step 170M": (step_170m, 45),
    "step 1B": (step_1b, 55),
    "samplers": (samplers, 45),
    "block cache": (block_cache, 30),
    "attention": (attention_kernels, 35),
    "step 1B, bfloat16 residual": (residual_1b, 35),
    "step 1B, FP8": (fp8_1b, 40),
    "step 1B, trunk": (trunk_1b, 55),
}


def _switched(tiny: bool, **keys: Any) -> dict[str, Any]:
    """Time adaptation steps with other keys of the model, to compare with those of the part `step 1B`."""
    shape = _TINY if tiny else BILLION_GPU
    return _steps(replace(shape, model=replace(shape.model, **keys)), vanilla=False)


def _steps(shape: Shape, *, vanilla: bool = True) -> dict[str, Any]:
    """Time the steps one after the other: memory is that of one model."""
    found: dict[str, Any] = {"config": {"shape": _described(shape), "precision": _precision()}}
    medians = {}
    for passes, name in ((0, "vanilla"), (1, "adaptation"))[0 if vanilla else 1 :]:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        timing = interleave({name: make_engine_step(shape, rate=float(passes))[1]}, warmup=2, rounds=5)[name]
        seconds = medians[name] = statistics.median(timing.wall)
        model = replace(shape.model, self_conditioned=passes > 0)
        flops = step_flops(model, shape.vocab, shape.length, LogLinear(), passes=passes).total * shape.batch
        peak = peak_flops(resolve_device("auto"))
        found[name] = {
            **asdict(timing),
            "tokens_per_s": shape.batch * shape.length / seconds,
            "mfu": flops / seconds / peak if peak is not None else None,
            "peak_gib": peak_memory() / 2**30,
        }
    if vanilla:
        found["adaptation over vanilla"] = medians["adaptation"] / medians["vanilla"]
    return found


def _rounds(timings: Mapping[str, Timing]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timings.items()}


def _described(shape: Shape) -> dict[str, Any]:
    return asdict(shape)


def _precision() -> str:
    return str(resolve_precision("auto", resolve_device("auto")))


def main(arguments: list[str]) -> int:
    """Run one part, and write its result or the reason why there is none."""
    name, file, *options = arguments
    function, _ = PARTS[name]
    try:
        found = {"status": "ok", "result": function("--tiny" in options)}
    except AbsentError as reason:
        found = {"status": "absent", "reason": str(reason)}
    atomic_write_text(Path(file), json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
