"""Twenty adaptation steps on every engine and split, against one process: `python -m tests.distributed.parity`."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from scmdm.checkpoint.reader import find_model
from scmdm.observability.run_metrics import read_metrics
from tests.conftest import ADAPTED, small_base
from tests.distributed.launching import launch
from tests.weights import weights_of

STEPS, BATCH = 20, 64


@dataclass(frozen=True)
class Case:
    engine: str
    processes: int  # 0: one, without torchrun
    micro_batch: int
    keys: tuple[str, ...] = ()

    @property
    def overrides(self):
        return [f"engine={self.engine}", f"train.micro_batch_size={self.micro_batch}", *self.keys]

    def __str__(self):
        ranks = max(1, self.processes)
        context = next((int(key.removeprefix("fsdp.context=")) for key in self.keys if "context" in key), 1)
        accumulated = BATCH * context // (ranks * self.micro_batch)
        split = f"{ranks} x {self.micro_batch}" + (f" ({accumulated})" if accumulated > 1 else "")
        return ", ".join((f"{self.engine}, {split}", *self.keys))


CASES = [
    Case("single", 0, 16),
    Case("fsdp2", 0, 32),
    Case("fsdp2", 2, 32, ("model.activation_checkpointing=full",)),
    Case("fsdp2", 2, 8, ("fsdp.reshard_after_estimate=true", "fsdp.offload=true")),
    Case("fsdp2", 4, 16, ("model.activation_checkpointing=selective",)),
    Case("fsdp2", 4, 8, ("fsdp.replicate=2",)),
    Case("fsdp2", 2, 32, ("fsdp.context=2", "model.compile=block")),
    Case("fsdp2", 4, 16, ("fsdp.context=2", "fsdp.replicate=2", "model.activation_checkpointing=full")),
    Case("deepspeed", 0, 32, ("deepspeed.stage=2",)),
    Case("deepspeed", 2, 8, ("deepspeed.stage=1",)),
    Case("deepspeed", 2, 8, ("deepspeed.stage=2",)),
    Case("deepspeed", 2, 32, ("deepspeed.stage=3",)),
    Case("deepspeed", 2, 8, ("deepspeed.stage=3", "deepspeed.param_persistence_threshold=0")),
]


def adapt_arguments(run, base, molecules, config, *overrides):
    """An adaptation whose learning rate does not depend on its length."""
    keys = [f"run_dir={run}", f"base={base}", f"data.path={molecules}", *ADAPTED, "precision=float32"]
    fixed = ["self_conditioning.rate=0.5", "optimizer.lr=3e-3", f"train.steps={STEPS}"]
    return ["adapt", str(config), *keys, *fixed, *overrides]


def rows(run):
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]


def assert_same(run, single):
    """The same losses, gradient norms, weights and averages, to float tolerance."""
    ours, theirs = rows(run), rows(single)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]
        assert (a["tokens"], a["evaluations"]) == (b["tokens"], b["evaluations"])
    for kind in ("ema", "raw"):
        found, expected = (weights_of(find_model(path), weights=kind) for path in (run, single))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def difference(run, single, key):
    """The largest relative difference over the steps."""
    return max(abs(a[key] / b[key] - 1) for a, b in zip(rows(run), rows(single), strict=True))


def main():
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        small_base(place)
        table = [
            "| engine, ranks x micro-batch (accumulated) | losses | gradient norms | last loss |",
            "|---|---|---|---|",
        ]
        for number, case in enumerate([Case("single", 0, BATCH), *CASES]):
            run, single = place / f"run{number}", place / "run0"
            arguments = adapt_arguments(run, place / "base", place / "qm9", place / "empty.yaml", *case.overrides)
            status, output = launch(case.processes, *arguments)
            assert status == 0, output
            assert_same(run, single)
            losses, norms = (difference(run, single, key) for key in ("loss", "grad_norm"))
            table.append(f"| {case} | {losses:.1e} | {norms:.1e} | {rows(run)[-1]['loss']:.7f} |")
            print(table[-1], file=sys.stderr, flush=True)
    print("\n".join(table))


if __name__ == "__main__":
    main()
