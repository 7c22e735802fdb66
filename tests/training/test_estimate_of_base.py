"""`self_conditioning.carried_from=base`: a frozen base makes the estimate that training conditions on."""

import pytest
import torch

from scmdm.checkpoint.reader import find_model
from scmdm.cli import main
from scmdm.config.loading import load_config
from scmdm.config.run import RunConfig
from scmdm.diffusion.objective import self_conditioned_nelbo, token_weights
from scmdm.diffusion.state import State
from scmdm.distributed.base_estimate import EstimatedByBase, WithoutAdapters
from scmdm.errors import UserError
from scmdm.models.initialization import init_weights
from scmdm.models.lora import is_added
from scmdm.models.model_files import open_model
from scmdm.models.tensor_files import tensor_shapes
from scmdm.observability.run_metrics import read_metrics
from scmdm.training.setup import build_engine, build_spec, resolve_config
from tests.conftest import ADAPTED
from tests.models.test_carrying import HIDDEN, LogLinear, make, make_batch
from tests.weights import load_weights, weights_of

KEYS = ["self_conditioning.preset=residual_context", "optimizer.conditioner_lr=0.05"]


@pytest.mark.parametrize("keys", [{}, HIDDEN, {"mixing": "interpolated"}], ids=str)
def test_the_loss_pass_is_conditioned_on_the_estimate_of_the_base(keys):
    model, base, batch = make(inject_layer=0, **keys), make(inject_layer=0, seed=1, **keys), make_batch(rate=0.5)
    output = self_conditioned_nelbo(EstimatedByBase(model, base), batch, LogLinear(), condition=True)
    with torch.no_grad():
        estimate = torch.where(batch.conditioned[:, None, None], base.estimate(State(batch.z, batch.t)), 0)
    state = State(batch.z, batch.t, estimate)
    expected, _ = model.weighted_nll(state, batch.x, token_weights(batch, LogLinear()))
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    assert output.passes == 2
    output.loss.backward()
    assert all(parameter.grad is None for parameter in base.parameters())


def test_without_adapters_the_model_is_its_base_bitwise():
    base, model = make(inject_layer=0, self_conditioned=False), make(inject_layer=0, lora_rank=3)
    load_weights(model, dict(base.named_parameters()), "base", new_conditioner=True)
    batch = make_batch()
    state = State(batch.z, batch.t)
    assert not torch.allclose(model.estimate(state), base.estimate(state), atol=1e-3)
    assert torch.equal(WithoutAdapters(model, model).estimate(state), base.estimate(state))
    assert not torch.allclose(model.estimate(state), base.estimate(state), atol=1e-3), "they are on again"


@pytest.mark.parametrize("keys", [{}, {"mixing": "interpolated"}, HIDDEN], ids=str)
def test_the_first_step_is_that_of_the_base_and_has_a_gradient(keys):
    model, batch = make(inject_layer=0, **keys), make_batch()
    init_weights(model, 0, only=is_added)
    own, by_base = (
        self_conditioned_nelbo(one, batch, LogLinear(), condition=True).loss
        for one in (model, EstimatedByBase(model, make(inject_layer=0, seed=1, **keys)))
    )
    assert torch.equal(own, by_base)
    by_base.backward()
    assert sum(float(p.grad.abs().sum()) for p in model.conditioner.parameters()) > 0


def arguments(base, molecules, empty_yaml, run, *keys):
    own = [f"run_dir={run}", f"base={base}", f"data.path={molecules}", *ADAPTED, "precision=float32", *KEYS, *keys]
    return [str(empty_yaml), *own]


@pytest.mark.parametrize("keys", [[], ["model.lora_rank=2"]], ids=["copy", "adapters"])
def test_the_base_is_frozen_and_no_part_of_the_run(base, molecules, empty_yaml, tmp_path, keys):
    """Interrupted and resumed runs are equal; a checkpoint holds the model alone, and samples without the base."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["adapt", *arguments(base, molecules, empty_yaml, whole, "train.steps=6", *keys)]) == 0
    for steps in (3, 6):
        assert main(["adapt", *arguments(base, molecules, empty_yaml, parts, f"train.steps={steps}", *keys)]) == 0
    ours, theirs = (weights_of(find_model(run)) for run in (whole, parts))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    of_base = weights_of(find_model(base))
    changed = [name for name in of_base if not torch.equal(ours[name], of_base[name])]
    assert (changed == []) == bool(keys)
    assert all(is_added(name) for name in ours.keys() - of_base.keys())
    assert not torch.equal(ours["conditioner.strength"], torch.zeros(1))
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if row["kind"] == "train"]
    assert rows[-1]["evaluations"] == 2 * 6 * 64
    out = tmp_path / "export"
    assert main(["export", str(whole), str(out)]) == 0
    assert "strength" in " ".join(tensor_shapes(out)) and open_model(out).spec.model.mixing == "interpolated"
    assert (
        main(["sample", str(out), "num=4", "sampler.steps=4", "device=cpu", f"out={tmp_path / 'samples.jsonl'}"]) == 0
    )


def test_the_copy_has_the_weights_of_the_base_and_no_conditioner(base, molecules, empty_yaml, tmp_path):
    given = arguments(
        base, molecules, empty_yaml, tmp_path / "run", "train.steps=2", "model.dropout=0.5", "engine=single"
    )
    config = load_config(RunConfig, empty_yaml, given[1:])
    stored = open_model(find_model(base))
    config = resolve_config(config, stored)
    spec = build_spec(config, stored.manifest, stored)
    engine = build_engine(config, spec, stored, torch.device("cpu"), torch.float32)
    assert engine.base.conditioner is None and not engine.base.training
    own, expected = dict(engine.base.named_parameters()), weights_of(find_model(base))
    assert own.keys() == expected.keys() and all(torch.equal(own[name], value) for name, value in expected.items())
    assert not any(parameter.requires_grad for parameter in own.values())


def test_what_has_no_base_is_refused(base, molecules, empty_yaml, tmp_path, capsys):
    keys = [f"run_dir={tmp_path / 'run'}", f"data.path={molecules}", "train.steps=2", *KEYS]
    assert main(["train", str(empty_yaml), *keys]) == 1
    assert "self_conditioning.carried_from" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"self_conditioning\.carried_from=.*engine=deepspeed"):
        load_config(RunConfig, empty_yaml, [*keys, "engine=deepspeed"])
