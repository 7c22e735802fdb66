"""Lightning checkpoints of MDLM, discrete-diffusion-guidance and Duo, written as hydra and Lightning write them."""

import collections
import copy
import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scmdm
from scmdm.cli import main
from scmdm.convert.lightning import read_checkpoint
from scmdm.diffusion.state import State
from scmdm.models.model_files import read_spec
from tests.convert.published import (
    DUO_RUN,
    LENGTH,
    MDLM_RUN,
    VOCAB,
    WORDS,
    mdlm_weights,
    published_logits,
    write_lightning,
    write_mdlm,
)


def changed(run, **changes):
    """A configuration with other values, by name with double underscores for dots; an ellipsis removes one."""
    run = copy.deepcopy(run)
    for name, value in changes.items():
        *path, last = name.split("__")
        place = run
        for part in path:
            place = place[part]
        place[last] = value
        if value is ...:
            del place[last]
    return run


def run_import(source, out, capsys, *keys):
    code = main(["import", str(source), str(out), *keys])
    captured = capsys.readouterr()
    assert code == 0 or (captured.err.count("\n") == 1 and not out.exists())
    return code, captured.err if code else captured.out


@pytest.mark.parametrize("name", ["mdlm", "duo"])
@pytest.mark.parametrize("conditioned", [True, False])
def test_logits_of_a_run_are_those_of_the_original_code(tmp_path, capsys, name, conditioned):
    """With and without time conditioning, which MDLM states at the top and Duo in the section `algo`."""
    run = MDLM_RUN if name == "mdlm" else DUO_RUN
    run = changed(run, **{"time_conditioning" if name == "mdlm" else "algo__time_conditioning": conditioned})
    checkpoint = write_lightning(tmp_path / "last.ckpt", run)
    code, said = run_import(checkpoint, tmp_path / "out", capsys, "weights=raw")
    assert code == 0, said
    spec = read_spec(tmp_path / "out")
    assert spec.length == LENGTH and spec.model.time_conditioning is conditioned
    loaded = scmdm.load(tmp_path / "out", device="cpu")
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.8]).double()
    sigma = -torch.log1p(-(1 - 1e-3) * t).float() if conditioned else torch.zeros(2)
    expected = published_logits(mdlm_weights(), ids, sigma)
    with torch.no_grad():
        found = loaded.model.logits(loaded.model.hidden(State(ids, t)).flatten(0, 1)).view(2, LENGTH, -1)
    real = torch.arange(VOCAB) != spec.mask_id
    torch.testing.assert_close(found[..., real], expected[..., real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(("kind", "ours"), [("cosine", "cosine"), ("log-linear", "log_linear")])
def test_the_noise_of_a_run_of_duo(tmp_path, capsys, kind, ours, conditioned):
    """Duo's network is conditioned on `-log alpha_t`."""
    run = changed(DUO_RUN, noise={"type": kind, "eps": 2e-3}, algo__time_conditioning=conditioned)
    code, said = run_import(write_lightning(tmp_path / "last.ckpt", run), tmp_path / "out", capsys, "weights=raw")
    assert code == 0, said
    spec = read_spec(tmp_path / "out")
    assert (spec.diffusion.schedule, spec.diffusion.eps) == (ours, 2e-3)
    t = torch.tensor([0.3, 1.0]).double()
    scaled = (1 - 2e-3) * t
    alpha = 1 - torch.cos(torch.pi / 2 * (1 - scaled)) if kind == "cosine" else 1 - scaled
    torch.testing.assert_close(spec.schedule.alpha(t), alpha)
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = published_logits(mdlm_weights(), ids, -alpha.log().float() if conditioned else torch.zeros(2))
    model = scmdm.load(tmp_path / "out", device="cpu").model
    with torch.no_grad():
        found = model.logits(model.hidden(State(ids, t)).flatten(0, 1)).view(2, LENGTH, -1)
    real = torch.arange(VOCAB) != spec.mask_id
    torch.testing.assert_close(found[..., real], expected[..., real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "noted"), [("cosine", True), ("loglinear", False)])
def test_another_noise_of_a_run_without_time_conditioning_is_noted(tmp_path, capsys, kind, noted):
    run = changed(MDLM_RUN, noise__type=kind, time_conditioning=False)
    code, said = run_import(write_lightning(tmp_path / "last.ckpt", run), tmp_path / "out", capsys, "weights=raw")
    assert code == 0 and ("noise.type" in said) is noted, said
    assert read_spec(tmp_path / "out").diffusion.schedule == "log_linear"


def test_a_uniform_state_run_gets_a_mask(tmp_path, capsys):
    weights = mdlm_weights(rows=len(WORDS))
    run = changed(MDLM_RUN, diffusion="uniform", parameterization="d3pm", zero_recon_loss=True)
    checkpoint = write_lightning(tmp_path / "last.ckpt", run, weights, ema=None)
    code, said = run_import(checkpoint, tmp_path / "out", capsys)
    assert code == 0, said
    assert read_spec(tmp_path / "out").vocab_size == len(WORDS) + 1


REFUSED = [
    ("mdlm", "parameterization", "sedd", "parameterization"),
    ("mdlm", "parameterization", "ar", "parameterization"),
    ("mdlm", "backbone", "dimamba", "backbone"),
    ("mdlm", "diffusion", "gaussian", "diffusion"),
    ("mdlm", "is_vision", True, "is_vision"),
    ("mdlm", "time_conditioning", ..., "time_conditioning"),
    ("mdlm", "time_conditioning", "yes", "time_conditioning"),
    ("mdlm", "noise__type", "cosine", "noise.type"),
    ("mdlm", "model__n_blocks", 5, "model.n_blocks"),
    ("mdlm", "model__cond_dim", 5, "model.cond_dim"),
    ("mdlm", "model__hidden_size", 5, "model.hidden_size"),
    ("mdlm", "model__n_heads", 3, "model.n_heads"),
    ("mdlm", "model__type", "mamba", "model.type"),
    ("mdlm", "model__qk_norm", True, "model.qk_norm"),
    ("mdlm", "block_size", 16, "block_size"),
    ("duo", "algo__parameterization", "score", "algo.parameterization"),
    ("duo", "algo__parameterization", "ar", "algo.parameterization"),
    ("duo", "algo__backbone", "unet", "algo.backbone"),
    ("duo", "algo__name", "bd3lm", "algo.name"),
    ("duo", "algo__causal_attention", True, "algo.causal_attention"),
    ("duo", "algo__time_conditioning", ..., "time_conditioning"),
    ("duo", "algo__hybrid_mixing", 0.25, "algo.hybrid_mixing"),
    ("duo", "time_conditioning", False, "algo.time_conditioning"),  # beside another one
    ("duo", "algo", "duo", "algo"),
    ("duo", "noise__type", "geometric", "noise.type"),
    ("duo", "noise__eps", 0.9, "noise.eps"),
]


@pytest.mark.parametrize(("name", "key", "value", "named"), REFUSED, ids=[f"{r[0]}-{r[1]}-{r[2]}" for r in REFUSED])
def test_other_runs_are_refused_by_name(tmp_path, capsys, name, key, value, named):
    run = changed(MDLM_RUN if name == "mdlm" else DUO_RUN, **{key: value})
    code, said = run_import(write_lightning(tmp_path / "last.ckpt", run), tmp_path / "out", capsys)
    assert code == 1 and named in said


def test_keys_replace_what_a_run_says(tmp_path, capsys):
    checkpoint = write_lightning(tmp_path / "last.ckpt", changed(DUO_RUN, algo__hybrid_mixing=0.25))
    keys = ["ignore=[algo.hybrid_mixing]", "time_conditioning=false"]
    assert run_import(checkpoint, tmp_path / "out", capsys, *keys)[0] == 0
    assert read_spec(tmp_path / "out").model.time_conditioning is False


@pytest.mark.parametrize(("kind", "default"), [("mdlm", False), ("udlm", True), ("duo", True)])
def test_time_conditioning_is_that_of_the_class(tmp_path, capsys, kind, default):
    """The configurations of Duo on the hub do not state it, because its class has no choice."""
    source = write_mdlm(tmp_path / "there", model_type=kind, time_conditioning=None, causal=False, cfg=False)
    assert run_import(source, tmp_path / "out", capsys)[0] == 0
    assert read_spec(tmp_path / "out").model.time_conditioning is default


@pytest.mark.parametrize(
    ("field", "value"),
    [("causal", True), ("cfg", True), ("block_size", 4), ("model_type", "bd3lm"), ("hidden_dim", 64), ("n_blocks", 3)],
)
def test_other_networks_on_the_hub_are_refused_by_name(tmp_path, capsys, field, value):
    code, said = run_import(write_mdlm(tmp_path / "there", **{field: value}), tmp_path / "out", capsys)
    assert code == 1 and f"{field}=" in said


class AttributeDict(dict):
    """As in Lightning."""


class Items(list):
    pass


def test_containers_of_any_class_are_read(tmp_path, capsys):
    """Subclasses of dict and list, which get their items after they are made, and those with attributes besides."""
    attributes = AttributeDict(x=1)
    attributes.note = "an attribute"
    counted = collections.defaultdict(dict, {"now": {("%Y",): "2026"}})
    loops = {"a": attributes, "b": counted, "c": collections.deque([1, 2]), "d": Items([3])}
    checkpoint = write_lightning(tmp_path / "last.ckpt", loops=loops, callbacks=collections.Counter("aab"))
    found = read_checkpoint(checkpoint)["loops"]
    assert found == {"a": {"x": 1}, "b": {"now": {("%Y",): "2026"}}, "c": [1, 2], "d": [3]}
    assert type(found["a"]) is not AttributeDict
    assert run_import(checkpoint, tmp_path / "out", capsys)[0] == 0


def test_hyper_parameters_may_be_of_a_class(tmp_path, capsys):
    content = torch.load(write_lightning(tmp_path / "last.ckpt"), weights_only=False)["hyper_parameters"]
    checkpoint = write_lightning(tmp_path / "other.ckpt", hyper_parameters=AttributeDict(content))
    assert run_import(checkpoint, tmp_path / "out", capsys)[0] == 0
    assert read_spec(tmp_path / "out").model.time_conditioning


_VALUES = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text("abc", max_size=3)
_VALUES = _VALUES | st.lists(_VALUES, max_size=2) | st.dictionaries(st.text("abc", min_size=1, max_size=3), _VALUES)
_PLACES = [*MDLM_RUN, "new", "noise__type", *(f"model__{key}" for key in (*MDLM_RUN["model"], "new"))]


@settings(max_examples=10, deadline=None)
@given(place=st.sampled_from(_PLACES), value=_VALUES)
def test_no_value_of_a_run_ends_in_a_traceback(place, value):
    if place == "hydra":
        return
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(said), redirect_stdout(io.StringIO()):
        checkpoint = write_lightning(Path(folder, "last.ckpt"), changed(MDLM_RUN, **{place: value}))
        code = main(["import", str(checkpoint), str(Path(folder, "out"))])
    assert code == 0 or (code == 1 and said.getvalue().count("\n") == 1)
