"""State and traffic of real processes beside the plan; started by torchrun, rank 0 prints JSON.

With the argument `experts`, the ranks share the experts of a mixture.
"""

import json
import sys

import torch
import torch.distributed as dist

from scmdm.distributed.ema import Ema
from scmdm.planner.communication import step_collectives
from scmdm.planner.rank_memory import rank_memory
from scmdm.planner.workload import make_layout, make_workload
from tests.planner.measuring import Collectives, engine_of, loss_of, masked_batch, run_config, spec_of, storage_bytes

VOCAB, LENGTH = 61, 16
MIXTURE = {"kind": "decoder", "width": 32, "layers": 2, "heads": 4, "mlp_width": 48, "experts": 12, "expert_width": 16}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    shared = sys.argv[1:] == ["experts"]
    config = run_config("fsdp2", batch=ranks, fsdp={"experts": ranks if shared else 1}, **MIXTURE if shared else {})
    workload = make_workload(config, spec_of(config, VOCAB, LENGTH))
    layout = make_layout(config, ranks, torch.float32)
    engine = engine_of(config, VOCAB, LENGTH)
    averages = Ema(engine, config.ema).average
    with Collectives() as sent:
        engine.backward(loss_of(engine, config, masked_batch(1, LENGTH, VOCAB)), last=True)
    gradients = storage_bytes([parameter.grad for parameter in engine.trained.values()])
    engine.step(torch.tensor(False))
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    mine = [
        storage_bytes(engine.parameters().values()),
        gradients,
        storage_bytes(states),
        storage_bytes(averages.values()),
    ]
    everyone: list[list[int]] = [[] for _ in range(ranks)]
    dist.all_gather_object(everyone, mine)
    if engine.rank == 0:
        state = rank_memory(workload, layout).state
        collectives = sorted([one.kind, one.size, one.times] for one in step_collectives(workload, layout))
        found = {
            "state": everyone,
            "planned": [state.weights, state.gradients, state.moments, state.averages],
            "all_gathered": sent.bytes("all_gather"),
            "planned_gathered": sum(size * times for kind, size, times in collectives if kind == "all_gather"),
            "exchanged": sent.bytes("all_to_all"),
            "planned_exchanged": sum(size * times for kind, size, times in collectives if kind == "all_to_all"),
        }
        print("RESULT", json.dumps(found))
    dist.barrier()  # who leaves first would tear the connection under the other
    dist.destroy_process_group()
