"""Models that see the samples' labels: two genomes, one of A and T, the other of C and G."""

import json
import random

import pytest
import torch

from scmdm.checkpoint.reader import find_model
from scmdm.cli import main
from scmdm.data.loader import build_loader, read_labels
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import NO_LABEL, State
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import read_spec
from tests.conftest import ADAPTED, TINY

LETTERS = {"cold": "CG", "warm": "AT"}


def genomes(place, letters, empty_yaml, *keys):
    (place / "fasta").mkdir(parents=True)
    for number, (species, alphabet) in enumerate(letters.items()):
        text = "".join(random.Random(number).choices(alphabet, k=6000))
        (place / "fasta" / f"{species}.fa").write_text(f">{species}\n{text}\n")
    keys = ("source.name=genomes", "tokenizer.name=dna", "length=18", "workers=1", "source.block_windows=4", *keys)
    options = [
        f"source.path={place / 'fasta'}",
        f"out={place / 'data'}",
        "validation_fraction=0.2",
        "test_fraction=0.1",
    ]
    assert main(["prepare", str(empty_yaml), *keys, *options]) == 0
    return place / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory, empty_yaml):
    return genomes(tmp_path_factory.mktemp("labels"), LETTERS, empty_yaml, "source.species_from=file")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, data, empty_yaml):
    run = tmp_path_factory.mktemp("labelled") / "run"
    keys = [*TINY, "model.labels=true", "train.steps=80", "optimizer.lr=0.01", "train.validate_every=40"]
    assert main(["train", str(empty_yaml), f"run_dir={run}", f"data.path={data}", *keys]) == 0
    return run


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, data, labelled, empty_yaml):
    run = tmp_path_factory.mktemp("adapted") / "run"
    keys = [f"base={labelled}", f"data.path={data}", "self_conditioning.rate=1", "train.steps=12", "optimizer.lr=0.003"]
    assert main(["adapt", str(empty_yaml), f"run_dir={run}", *ADAPTED, *keys]) == 0
    return run


def drawn(model, out, *keys):
    assert main(["sample", str(model), f"out={out}", "num=64", "sampler.steps=8", "device=cpu", *keys]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def warm_share(rows):
    letters = "".join(row["text"] for row in rows)
    return sum(letter in LETTERS["warm"] for letter in letters) / len(letters)


@pytest.mark.parametrize("of", ["labelled", "adapted"])
def test_samples_are_of_their_label(of, request, tmp_path):
    model = request.getfixturevalue(of)
    rows = drawn(model, tmp_path / "a.jsonl", "sampler.label=each")
    assert [row["label"] for row in rows] == ["cold", "warm"] * 32
    by_label = {label: [row for row in rows if row["label"] == label] for label in LETTERS}
    assert warm_share(by_label["warm"]) > 0.75 and warm_share(by_label["cold"]) < 0.25
    guided = drawn(model, tmp_path / "b.jsonl", "sampler.label=warm", "sampler.guidance=3")
    assert {row["evaluations"] for row in guided} == {16} and {row["evaluations"] for row in rows} == {8}
    assert warm_share(guided) >= warm_share(by_label["warm"])
    free = drawn(model, tmp_path / "c.jsonl")
    assert warm_share(by_label["cold"]) < warm_share(free) < warm_share(by_label["warm"]) and "label" not in free[0]


def test_transformers_get_the_label(adapted, tmp_path, capsys):
    hub = pytest.importorskip("scmdm.integrations.transformers")
    assert main(["export", str(adapted), str(tmp_path / "mdlm"), "format=mdlm"]) == 1
    assert "model.labels=true" in capsys.readouterr().err
    assert main(["export", str(adapted), str(tmp_path / "hub"), "format=hub"]) == 0
    theirs, labels = hub.MaskedDiffusion.from_pretrained(tmp_path / "hub").eval(), torch.arange(64) % 2
    mask_id, warm = theirs.spec.mask_id, torch.tensor([4, 7])  # A and T
    z = torch.full((64, 18), mask_id)
    z[:, 0] = 1
    settings = SamplerSettings(steps=8, guidance=2.0, carry=True)
    share = torch.isin(theirs.denoise(z, settings, labels=labels)[:, 1:-1], warm).double().mean(1)
    assert share[labels == 1].mean() > 0.85 and share[labels == 0].mean() < 0.15
    with torch.no_grad():
        seen, blind = theirs(z, labels=labels).logits, theirs(z).logits
    assert not torch.equal(seen, blind)


def test_fasta_names_the_label(labelled, tmp_path):
    out = tmp_path / "a.fasta"
    assert main(["sample", str(labelled), f"out={out}", "num=2", "sampler.label=cold", "device=cpu"]) == 0
    assert [line.endswith("label=cold") for line in out.read_text().splitlines() if line[0] == ">"] == [True, True]


def test_the_likelihood_is_given_the_label(labelled, data, tmp_path):
    """With the label a letter costs log 2, without it log 4 until another one is seen."""
    validated = [json.loads(line) for line in (labelled / "metrics.jsonl").read_text().splitlines()]
    nelbo = [row["nelbo_null"] for row in validated if row["kind"] == "validation"][-1]
    out = tmp_path / "e.json"
    keys = [f"data={data}", "num=0", "split=validation", "device=cpu", f"out={out}"]
    assert main(["evaluate", str(labelled), *keys]) == 0
    assert json.loads(out.read_text())["nelbo"]["null"]["mean"] == pytest.approx(nelbo, rel=0.05)
    assert nelbo < 0.80 * 16 / 17, "log 2 = 0.69 for 16 letters of 17 tokens, and not much more"


def test_genomes_are_compared_by_species(labelled, data, tmp_path):
    """Those of the other species would be far away, but for letters that neither has."""
    found = {}
    for label, num in (("each", 64), ("warm", 32)):
        out = tmp_path / f"{label}.json"
        keys = [f"data={data}", f"num={num}", "nelbo_samples=0", "sampler.steps=8", f"sampler.label={label}"]
        assert main(["evaluate", str(labelled), *keys, "device=cpu", f"out={out}"]) == 0
        found[label] = json.loads(out.read_text())["samples"][0]["metrics"]
    assert set(found["each"]["species"]) == set(LETTERS) and set(found["warm"]["species"]) == {"warm"}
    assert found["each"]["weighted_js_distance_3"] < 0.4 < found["warm"]["js_distance_3"]
    assert "weighted_js_distance_3" not in found["warm"], "cold ones were not drawn"


def test_the_spec_and_the_batches_know_the_classes(labelled, adapted, data):
    for run in (labelled, adapted):
        spec = read_spec(find_model(run))
        assert spec.classes == 2 and spec.model.labels
    batch = next(iter(build_loader(DataMixture.at(data), "train", batch_size=8, shuffle=True, seed=0, drop_last=True)))
    stored = torch.from_numpy(read_labels(data, "train"))
    assert torch.equal(batch["label"], stored[batch["index"]].long())


def test_without_a_label_is_the_last_row():
    config = DiTConfig(width=16, layers=1, heads=2, condition_width=8, labels=True)
    model = DiT(config, vocab_size=10, mask_id=9, schedule=LogLinear(), classes=3)
    init_weights(model, 0)
    torch.nn.init.normal_(model.blocks[0].adaLN_modulation.weight)
    z, t = torch.full((2, 4), 9), torch.ones(2).double()
    none = model.hidden(State(z, t, labels_B=torch.tensor([NO_LABEL, 1])))
    torch.testing.assert_close(model.hidden(State(z, t))[0], none[0])
    assert not torch.allclose(none[0], none[1])
    assert model.cond_map.embedding_table.weight.shape == (4, 8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["sampler.label=hot"], "sampler.label=hot is not possible; it must be each or one of cold, warm"),
        (["sampler.guidance=2"], "sampler.guidance=2.0 is not possible; it must be 1 without sampler.label"),
        (["sampler.label=cold", "sampler.guidance=-1"], "sampler.guidance=-1.0 is not possible"),
    ],
)
def test_impossible_samples(labelled, keys, message, capsys):
    assert main(["sample", str(labelled), *keys]) == 1
    assert message in capsys.readouterr().err


def test_models_and_data_without_labels_are_named(base, molecules, labelled, tmp_path, empty_yaml, capsys):
    assert main(["sample", str(base), "sampler.label=warm"]) == 1
    assert "sampler.label=warm, but the model has no labels" in capsys.readouterr().err
    keys = [*TINY, "train.steps=2", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", str(empty_yaml), *keys, f"data.path={molecules}", "model.labels=true"]) == 1
    assert "model.labels=true, but the samples of data.path=" in capsys.readouterr().err
    assert main(["train", str(empty_yaml), *keys, f"data.path={molecules}", "train.label_dropout=0.2"]) == 1
    assert "train.label_dropout=0.2 is not possible with model.labels=false" in capsys.readouterr().err
    decoder = ["model.kind=decoder", "model.labels=true"]
    assert main(["train", str(empty_yaml), *keys, f"data.path={molecules}", *decoder]) == 1
    assert "unknown key `model.condition_width`" in capsys.readouterr().err
    other = genomes(tmp_path / "other", {"cold": "CG", "hot": "AT"}, empty_yaml, "source.species_from=file")
    adaptation = [*ADAPTED, f"run_dir={tmp_path / 'run'}", f"base={labelled}", "train.steps=2"]
    capsys.readouterr()
    assert main(["adapt", str(empty_yaml), *adaptation, f"data.path={other}", "self_conditioning.rate=1"]) == 1
    assert "labels cold, warm, but data.path=" in capsys.readouterr().err
    assert Manifest.read(other).labels == ["cold", "hot"]
