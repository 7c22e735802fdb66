"""State and traffic of DeepSpeed's stages with a fake process group, beside the plan, as JSON.

`python -m tests.planner.zero RANKS`: in a process of its own, because DeepSpeed remembers its process groups.
"""

import json
import os
import sys
import warnings

import torch

from benchmarks.counting import fake_ranks
from scmdm.distributed.ema import Ema
from scmdm.planner.communication import step_collectives
from scmdm.planner.sharding import gathered_weights, rank_state
from scmdm.planner.workload import make_layout, make_workload
from tests.planner.measuring import (
    Collectives,
    engine_of,
    loss_of,
    masked_batch,
    run_config,
    spec_of,
    storage_bytes,
)

VOCAB, LENGTH = 61, 16
BATCHES = 2
CASES = [(stage, dtype, 1.0, 0) for stage in (1, 2, 3) for dtype in (torch.float32, torch.bfloat16)]
CASES += [(3, torch.bfloat16, 0.0, 0), (3, torch.bfloat16, 1.0, 2)]


def compare(stage, dtype, rate, inject_layer, ranks):
    keys = {"stage": stage, "param_persistence_threshold": 0}
    config = run_config("deepspeed", rate=rate, batch=ranks * BATCHES, deepspeed=keys, width=64, layers=4)
    config.model.inject_layer = inject_layer
    engine = engine_of(config, VOCAB, LENGTH, dtype)
    workload = make_workload(config, spec_of(config, VOCAB, LENGTH))
    layout = make_layout(config, ranks, dtype)
    state = rank_state(workload, layout)
    planned, found = state_bytes(state), measured_state(engine, config)
    planned["buckets"], planned["gradients"] = gathered_weights(workload, layout).buckets, state.gradients
    sent, found["buckets"], found["gradients"] = one_step(engine, config)
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        planned[kind] = sum(
            one.size * one.times for one in step_collectives(workload, layout) if one.kind == kind and one.times
        )
        found[kind] = sent.bytes(kind)
    return {"stage": stage, "dtype": str(dtype), "planned": planned, "found": found}


def state_bytes(state):
    return {"weights": state.weights, "moments": state.moments, "averages": state.averages}


def measured_state(engine, config):
    updated = [value for group in engine.optimizer.param_groups for value in group["params"]]
    model = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    averages = Ema(engine, config.ema).average.values()
    return {
        "weights": storage_bytes([*model, *updated]),
        "moments": storage_bytes(moments),
        "averages": sum(value.nbytes for value in averages),
    }


def one_step(engine, config):
    """Of the second step, since DeepSpeed learns the order of things in the first: what was sent, and the bytes of
    DeepSpeed's buffers during the backward pass and of the gradients before the update."""
    batch, buffers = masked_batch(1, LENGTH, VOCAB), [0]
    for parameter in engine.model.parameters():
        parameter.register_hook(lambda _: buffers.append(bucket_bytes(engine._zero)))
    for _ in range(2):
        with Collectives() as seen:
            for index in range(BATCHES):
                engine.backward(loss_of(engine, config, batch), last=index == BATCHES - 1)
            parts = [part for group in engine._zero.averaged_gradients.values() for part in group or ()]
            gradients = sum(part.nbytes for part in parts)
            engine.clip_grad_norm(config.optimizer.clip)
    return seen, max(buffers), gradients


def bucket_bytes(zero):
    buffers = [bucket.buffer for bucket in zero.ipg_buckets.values()]
    each = [one for buffer in buffers for one in (buffer if isinstance(buffer, list) else [buffer])]
    return sum(buffer.nbytes for buffer in each)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore")
    ranks = int(sys.argv[1])
    with fake_ranks(ranks):
        print("RESULT", json.dumps([compare(*case, ranks) for case in CASES]))
