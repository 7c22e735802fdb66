"""Steps of a small mixture whose experts several ranks share, beside those of one process; started by torchrun.

Rank 0 prints one line of JSON per case: the largest differences of losses, norms, gradients and weights.
"""

import json
import sys
from dataclasses import replace
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.run import RunConfig
from scmdm.diffusion.state import Sequences
from scmdm.distributed.ema import Ema
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.experts.expert_parallel import ExpertGroup
from scmdm.models.model_files import ModelSpec
from scmdm.training.setup import build_engine
from scmdm.training.step import train_step

VOCAB, LENGTH, BATCH, STEPS = 19, 12, 16, 2
MODEL = {"width": 16, "layers": 2, "heads": 4, "mlp_width": 24, "experts": 8, "experts_per_token": 2}
MODEL |= {"expert_width": 12, "shared_experts": 1, "router": "sigmoid", "router_bias": True, "router_bias_rate": 0.01}
GROUPED = {"router_groups": 4, "router_top_groups": 2, "router_loss": 0.01, "router_z_loss": 0.001}
BIAS = "router.balance.expert_bias"

#: changes of the model, of the keys of FSDP2, and of the rest of the configuration
CASES = {
    "plain": ({}, {}, {}),
    "accumulated": ({"activation_checkpointing": "full", **GROUPED}, {"reshard_after_estimate": True}, {"micro": 2}),
    "injected": ({"activation_checkpointing": "selective", "inject_layer": 1, "dense_layers": 1}, {}, {"micro": 2}),
    "adapters": ({"lora_rank": 2}, {}, {}),
    "base": ({"lora_rank": 2, "lora_targets": ["experts.gate", "experts.down"]}, {}, {"carried_from": "base"}),
    "last layer": ({}, {"offload": True}, {"last_layers": 1}),
    "two experts alone": ({"activation_checkpointing": "full"}, {}, {"alone": True}),
    "compiled": ({"compile": "block"}, {}, {}),
    "bfloat16": ({}, {}, {"dtype": torch.bfloat16}),
    "replicated": ({}, {"replicate": 2}, {}),
    "in context": ({}, {"context": 2}, {}),
}


def config_of(name, ranks, experts):
    model, fsdp, rest = CASES[name]
    config = RunConfig(run_dir="unused", engine="single" if ranks == 0 else "fsdp2", seed=5)
    config.model = DecoderConfig(**MODEL, **model, self_conditioned=True)
    config.model.validate()
    config.self_conditioning.rate = 0.5
    config.self_conditioning.carried_from = rest.get("carried_from", "own")
    config.train.last_layers = rest.get("last_layers")
    config.optimizer = replace(config.optimizer, lr=3e-3, clip=0.05)
    config.train.global_batch_size, config.train.micro_batch_size = BATCH, BATCH
    if ranks:
        config.train.micro_batch_size = rest.get("micro", BATCH // ranks * fsdp.get("context", 1))
        config.fsdp = replace(config.fsdp, experts=experts, **fsdp)
    return config


def steps(config, rest):
    """Results of the steps, gradients of the first one, and weights and averages at the end."""
    torch.manual_seed(0)
    spec = ModelSpec(config.model, DiffusionConfig(), VOCAB, VOCAB - 1, LENGTH)
    engine = build_engine(config, spec, None, torch.device("cpu"), rest.get("dtype", torch.float32))
    if rest.get("alone"):
        for name, bias in engine.frozen().items():
            if name.endswith(BIAS):
                bias[:2] = 10
    tokens = torch.randint(VOCAB - 1, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    everything = Sequences(tokens, torch.ones_like(tokens).bool(), torch.arange(BATCH))
    size = BATCH // engine.data_size
    own = everything[engine.data_rank * size : (engine.data_rank + 1) * size]
    ema, found, gradients = Ema(engine, replace(config.ema, decay=0.9)), [], {}
    clip = engine.clip_grad_norm

    def clip_and_keep(*arguments):
        own = {name: p.grad for name, p in engine.trained.items()}
        gradients.setdefault("first", whole(engine, own))
        norm = clip(*arguments)
        gradients.setdefault("clipped", whole(engine, own))
        return norm

    engine.clip_grad_norm = clip_and_keep
    for step in range(STEPS):
        result = train_step(engine, config, spec.schedule, VOCAB - 1, own, step)
        ema.update(engine)
        found.append((result.loss, result.grad_norm, result.expert_tokens.tolist()))
    tensors = {"weights": whole(engine, engine.parameters()), "ema": whole(engine, ema.average), **gradients}
    tensors["frozen"] = {name: full(value) for name, value in engine.frozen().items()}
    return found, tensors


def whole(engine, values):
    return {name: full(value) for name, value in engine.pack(values).items()}


def full(value):
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    return max(float((ours[name] - value).abs().max()) for name, value in theirs.items()) / largest


class Noted(ExpertGroup):
    """Notes the sizes of exchanges."""

    received: ClassVar = []

    def all_to_all(self, received, sent, received_sizes, sent_sizes):
        super().all_to_all(received, sent, received_sizes, sent_sizes)
        if sent.dtype != torch.int64:
            self.received.append(sum(received_sizes))


def compare(name, experts):
    Noted.received.clear()
    rest = CASES[name][2]
    ours, tensors = steps(config_of(name, dist.get_world_size(), experts), rest)
    exchanges = [None] * dist.get_world_size()
    dist.all_gather_object(exchanges, list(Noted.received))
    theirs, expected = steps(config_of(name, 0, 1), rest)
    return {
        "case": name,
        "experts": experts,
        "loss": max(abs(a[0] / b[0] - 1) for a, b in zip(ours, theirs, strict=True)),
        "norm": max(abs(a[1] / b[1] - 1) for a, b in zip(ours, theirs, strict=True)),
        "loads": [a[2] for a in ours] == [b[2] for b in theirs],
        **{kind: difference(tensors[kind], expected[kind]) for kind in expected if expected[kind]},
        "exchanges": [len(one) for one in exchanges],
        "least_rows": [min(one, default=0) for one in exchanges],
    }


if __name__ == "__main__":
    import scmdm.distributed.fsdp as fsdp

    fsdp.ExpertGroup = Noted
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        case, _, size = argument.rpartition("=")
        result = compare(case, int(size))
        if dist.get_rank() == 0:
            print("RESULT", json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()
