"""The demo shows what `scmdm sample` draws, and refuses what cannot be shown."""

import json
import math
import socket
import urllib.error
import urllib.request

import pytest
import torch

from scmdm.cli import main
from scmdm.config.sampling import DenoiseConfig, SamplerConfig
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.domains.molecules.figures import molecule_svg
from scmdm.errors import UserError
from scmdm.integrations.demo.server import make_app, open_models
from scmdm.integrations.demo.trajectory import best_guess, entropy, record
from scmdm.sampling.model_loading import load
from tests.conftest import ROOT, scmdm
from tests.diffusion.oracle import Oracle


@pytest.fixture(scope="session")
def client(adapted):
    return make_app(open_models(adapted, None)).test_client()


def test_what_a_step_shows_is_what_the_denoiser_predicted():
    oracle, seen = Oracle(), []
    given = torch.full((8, 3), oracle.mask_id)
    settings = SamplerSettings(kind="margin", steps=3)
    kwargs = {"schedule": LogLinear(), "settings": settings, "mask_id": oracle.mask_id, "seed": 0}
    watched = sample(oracle, given, torch.arange(8), **kwargs, on_step=seen.append)
    assert torch.equal(watched.tokens, sample(Oracle(), given, torch.arange(8), **kwargs).tokens)
    before = given
    for k, step in enumerate(seen, start=1):
        assert step.evaluations == k
        assert torch.equal(step.revealed_BL, (before == oracle.mask_id) & (step.z_BL != oracle.mask_id))
        masked = step.z_BL == oracle.mask_id
        expected = oracle.conditionals(before)[masked].log().float()
        torch.testing.assert_close(step.logits(masked), expected)
        before = step.z_BL
    assert k == 3


def test_entropy():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert entropy(p.log()).tolist() == pytest.approx([math.log(2), 0, math.log(3)])


@pytest.mark.parametrize("kind", ["ancestral", "first_hitting", "confidence"])
@pytest.mark.parametrize("prompt", [None, "CC"])
def test_it_is_the_sample_that_the_command_draws(adapted, tmp_path, kind, prompt):
    out, given = tmp_path / "samples.jsonl", [] if prompt is None else [f"prompt={prompt}"]
    keys = ["num=1", "seed=7", f"sampler.kind={kind}", "sampler.steps=6", "device=cpu", *given]
    assert main(["sample", str(adapted), f"out={out}", *keys]) == 0
    expected = json.loads(out.read_text())
    config = DenoiseConfig(seed=7, prompt=prompt, sampler=SamplerConfig(kind=kind, steps=6))
    trajectory = record(load(adapted, device="cpu"), config)
    assert trajectory.frames[-1].tokens == expected["tokens"] == trajectory.generated.tokens[0].tolist()
    assert len(trajectory.frames) == expected["evaluations"]
    mask = 3
    before = trajectory.given
    for frame in trajectory.frames:
        hidden = [i for i, token in enumerate(frame.tokens) if token == mask]
        assert [i for i, value in enumerate(frame.entropy) if value is not None] == hidden
        assert all(0 <= frame.entropy[i] <= 4 and frame.guess[i] != mask for i in hidden)
        assert frame.revealed == [i for i, token in enumerate(before) if token == mask != frame.tokens[i]]
        assert mask not in best_guess(frame)
        before = frame.tokens


def test_both_models_at_the_same_seed(client, adapted, base):
    models = client.get("/models").get_json()
    assert [(model["name"], model["carries"], model["path"]) for model in models] == [
        ("base", False, str(base)),
        ("adapted", True, str(adapted)),
    ]
    first, second = client.post("/denoise", json={"seed": 3, "sampler": {"steps": 8}}).get_json()
    assert first["evaluations"] == second["evaluations"] == 8
    assert [frame["revealed"] for frame in first["frames"]] == [frame["revealed"] for frame in second["frames"]]
    assert first["frames"][-2]["entropy"] != second["frames"][-2]["entropy"]
    shown = {i for sample in (first, second) for frame in sample["frames"] for i in frame["tokens"]}
    assert shown <= {int(i) for i in (*first["pieces"], *second["pieces"])}


def test_what_is_no_molecule_is_not_drawn():
    assert molecule_svg("CCO").startswith("<svg") and molecule_svg("C1CC") is None and molecule_svg("") is None


def test_molecules_have_drawings(client):
    infill = "CC[MASK]O"
    (base, _) = client.post("/denoise", json={"infill": infill, "sampler": {"steps": 4}}).get_json()
    given = [i for i, token in enumerate(base["given"]) if token != 3]
    assert len(base["given"]) - len(given) == 1
    places = [frame["drawing"] for frame in base["frames"]]
    assert all(place is None or base["drawings"][place].startswith("<svg") for place in places)
    assert (places[-1] is not None) == (molecule_svg(base["text"]) is not None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"sampler": {"steps": 0}}, "sampler.steps=0"),
        ({"sampler": {"steps": 100000}}, "sampler.steps=100000 is not possible"),
        ({"sampler": {"kind": "best"}}, "must be one of ancestral"),
        ({"seed": "x"}, "seed='x' in the request"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**70}, "between 0 and 2^62"),
        ({"prompt": "${oc.env:HOME}"}, "prompt='${oc.env:HOME}'"),
        ({"prompt": "${nothing}"}, "prompt='${nothing}'"),
        ({"out": "x.jsonl"}, "unknown key `out`"),
        ({"prompt": "C", "infill": "C"}, "both set"),
        ({"prompt": "Xx"}, "prompt='Xx' cannot be encoded"),
        ({"prompt": "C" * 99}, "the samples have 24"),
        ([1], "the request is a list"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_the_reason(client, content, said):
    answer = client.post("/denoise", json=content)
    assert answer.status_code == 400 and said in answer.get_json()["error"]


def test_only_json_is_taken(client):
    """A form of another site would be sent without asking this one."""
    assert client.post("/denoise", data="{}", content_type="text/plain").status_code == 415


def test_which_models_are_shown(adapted, base, tmp_path):
    checkpoint = next((adapted / "checkpoints").glob("step_*"))
    assert [shown.name for shown in open_models(checkpoint, None)] == ["base", "adapted"]
    assert [shown.name for shown in open_models(base, None)] == ["base"]
    export = tmp_path / "export"
    assert main(["export", str(adapted), str(export)]) == 0
    assert [shown.name for shown in open_models(export, None)] == ["adapted"]
    assert [shown.path for shown in open_models(export, base)] == [str(base), str(export)]


def test_a_base_of_other_data_is_refused(adapted):
    with pytest.raises(UserError, match="different tokenizers or lengths"):
        open_models(adapted, ROOT / "configs/qm9/base-model")


@pytest.mark.slow
def test_the_command_serves_the_page(adapted):
    process = scmdm("demo", adapted, "--port", 0)
    try:
        url = process.stdout.readline().split()[0]
        for name, kind in (("", "text/html"), ("page.js", "javascript"), ("page.css", "text/css"), ("models", "json")):
            with urllib.request.urlopen(f"{url}/{name}") as answer:
                assert kind in answer.headers["Content-Type"] and answer.read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/../server.py")
    finally:
        process.terminate()
        process.communicate()


def test_a_port_that_is_taken(base, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", str(base), "--port", str(port)]) == 1
    assert f"port={port} is not available" in capsys.readouterr().err
