"""Real processes on gloo: every engine and number of ranks finds the same NELBO on held-out sequences."""

import pytest

from scmdm.observability.run_metrics import read_metrics
from tests.distributed.launching import launch

pytestmark = pytest.mark.slow


def row(run):
    (found,) = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "validation"]
    return found


@pytest.mark.parametrize("padding", [pytest.param("length", marks=pytest.mark.long), "batch"])
def test_ranks_and_engines_find_one_nelbo(adapt, tmp_path, padding):
    """37 sequences: not divisible by any of the splits. The learning rate is small, for weights that stay the same."""
    keys = [
        "train.steps=1",
        "train.validate_every=1",
        "train.validation_samples=37",
        "optimizer.lr=1e-12",
        "schedule.warmup_steps=0",
    ]
    if padding == "batch":
        keys += ["train.padding=batch", "train.pad_multiple=1"]
    cases = {"single": (0, ["engine=single", "train.micro_batch_size=64"]), "fsdp2": (2, ["train.micro_batch_size=4"])}
    if padding == "length":
        cases["context"] = (4, ["train.micro_batch_size=2", "fsdp.context=2"])
        cases["zero3"] = (2, ["engine=deepspeed", "deepspeed.stage=3", "train.micro_batch_size=8"])
    for name, (processes, own) in cases.items():
        status, output = launch(processes, *adapt(tmp_path / name, *keys, *own))
        assert status == 0, output
    expected = row(tmp_path / "single")
    assert expected["nelbo_conditioned"] is not None
    for name in cases:
        for key in ("nelbo_null", "nelbo_conditioned", "stderr_null"):
            assert row(tmp_path / name)[key] == pytest.approx(expected[key], rel=1e-6), (name, key)
