"""Every domain through the one interface: real data measured against itself, drawn, and what belongs to another."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from scmdm.cli import main
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import is_framed, load_tokenizer
from scmdm.domains.domain_registry import DOMAINS, changed_keys, domain_of, load_domain, metrics_config
from scmdm.domains.interface import EvaluationSettings, GeneratedSamples
from scmdm.domains.sample_values import read_values, without_groups, write_values
from scmdm.errors import UserError

BACTERIUM = "".join(random.Random(0).choices("ACGT", weights=(4, 1, 1, 4), k=60_000))
PROTEOME = "".join(random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", weights=range(1, 21), k=16_000))
SETS = {
    "genomes": (
        "source.name=genomes",
        "tokenizer.name=dna",
        "length=34",
        "source.path={folder}",
        "source.block_windows=8",
    ),
    "images": ("source.name=digits", "tokenizer.name=levels", "length=65", "limit=400"),
    "molecules": ("source.name=qm9", "tokenizer.name=smiles", "length=24", "limit=400"),
    "proteins": (
        "source.name=proteins",
        "tokenizer.name=amino_acids",
        "length=34",
        "source.path={folder}/a.faa",
    ),
    "text": ("source.name=text", "tokenizer.name=bytes", "length=64", "source.path={folder}"),
}


@pytest.fixture(scope="module", params=SETS)
def dataset(request, tmp_path_factory):
    """Its domain's name, and where it is."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "a.fa").write_text(f">one\n{BACTERIUM}\n")
    (folder / "a.faa").write_text("".join(f">{i}\n{PROTEOME[40 * i : 40 * i + 30]}\n" for i in range(400)))
    (folder / "a.txt").write_text("\n\n".join(f"{i} green bottles hanging on the wall " * 50 for i in range(60)))
    (folder / "empty.yaml").write_text("{}")
    keys = [key.format(folder=folder) for key in SETS[request.param]]
    fractions = ("validation_fraction=0.2", "test_fraction=0.3")
    out = folder / "data"
    assert main(["prepare", str(folder / "empty.yaml"), *keys, *fractions, f"out={out}", "workers=1"]) == 0
    return request.param, out


def drawn_from(root, split, count):
    manifest = Manifest.read(root)
    tokenizer = load_tokenizer(root / manifest.tokenizer.file)
    rows = read_split(root, split).astype("int64")[:count]
    texts, framed = (
        [tokenizer.decode(row) for row in rows.tolist()],
        [is_framed(row, tokenizer, manifest.padding_id) for row in rows.tolist()],
    )
    return GeneratedSamples(torch.from_numpy(rows), texts, framed, [8] * len(rows), 1.0)


def require_consistent(domain, drawn):
    """A metric is that of its samples' values; without a group it is that of the other samples."""
    measured, samples = domain.measure(drawn), len(drawn.texts)
    others = domain.measure(pick(drawn, np.flatnonzero(next(without_groups(samples))))).metrics
    assert measured.values
    for name, values in measured.values.items():
        metric = measured.metrics[name]
        if values.kind == "jackknife":
            assert len(values.array) == samples
            assert values.array[0] == pytest.approx(others[name], nan_ok=True, rel=1e-4), name
        else:
            assert values.array.shape[-1] == samples
            assert (values.value() or 0.0) == pytest.approx(metric or 0.0), name
    return measured


def pick(drawn, rows):
    texts, framed = [drawn.texts[row] for row in rows], [drawn.framed[row] for row in rows]
    return GeneratedSamples(drawn.tokens[rows], texts, framed, [8] * len(rows), 1.0)


def test_real_data_is_good_and_can_be_drawn(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("scmdm.domains.images.classifier._STEPS", 150)
    name, root = dataset
    manifest = Manifest.read(root)
    found = load_domain(domain_of(manifest))
    assert found.name == name
    domain = found(root, manifest, found.Config(), EvaluationSettings())
    drawn = drawn_from(root, "test", 100)
    measured = require_consistent(domain, drawn)
    real = measured.metrics
    json.dumps(real)
    write_values(tmp_path / "values.npz", measured.values)
    again = read_values(tmp_path / "values.npz")
    assert {name: values.kind for name, values in again.items()} == {n: v.kind for n, v in measured.values.items()}
    assert all(np.array_equal(again[n].array, v.array, equal_nan=True) for n, v in measured.values.items())
    first = domain.metrics[0]
    assert all(drawn.framed) and real[first.name] is not None
    noise = torch.randint(4, manifest.vocab_size, drawn.tokens.shape, generator=torch.Generator().manual_seed(0))
    noise[:, 0] = manifest.bos_id
    tokenizer = load_tokenizer(root / manifest.tokenizer.file)
    texts, framed = zip(
        *((tokenizer.decode(r), is_framed(r, tokenizer, manifest.padding_id)) for r in noise.tolist()), strict=True
    )
    noisy = dataclasses.replace(drawn, tokens=noise, texts=list(texts), framed=list(framed))
    uniform = require_consistent(domain, noisy).metrics
    worse = uniform[first.name]  # None: not a single sample is valid
    assert worse is None or (real[first.name] > worse) == (first.better == "higher")
    rows = [
        {"text": text, "framed": True, "tokens": row}
        for text, row in zip(drawn.texts, drawn.tokens.tolist(), strict=True)
    ]
    caption = domain.draw(rows, tokenizer, tmp_path / "samples.png")
    assert (caption is not None) == (tmp_path / "samples.png").is_file() == (name in ("molecules", "images"))
    caption = domain.compare({"held out": rows, "real": rows[:50]}, tmp_path / "compared.png")
    assert (
        (caption is not None) == (tmp_path / "compared.png").is_file() == (name in ("molecules", "genomes", "proteins"))
    )
    nothing = [{**row, "framed": False} for row in rows]
    assert domain.compare({"held out": rows, "nothing": nothing}, tmp_path / "nothing.png") in (None, caption)


@pytest.mark.parametrize("name", DOMAINS.names)
def test_each_name_is_that_of_its_class(name):
    assert load_domain(name).name == name


KEYS = {
    "molecules": {"fcd": True, "moses": True},
    "text": {"scorer": None, "protocol": "text", "mauve": False, "known_words": False},
    "responses": {"scorer": None, "protocol": "text", "mauve": False},
    "images": {"inception": None},
}


@pytest.mark.parametrize("name", DOMAINS.names)
def test_metrics_take_the_keys_of_their_domain(name):
    own = KEYS.get(name, {})
    config = metrics_config(name, own)
    assert dataclasses.asdict(config) == own
    assert changed_keys(config) == {key: value for key, value in own.items() if value is True}
    for key in {key for keys in KEYS.values() for key in keys} - set(own):
        with pytest.raises(UserError, match=f"{key}.* the domain {name}"):
            metrics_config(name, {key: True})


@pytest.mark.parametrize(
    ("name", "keys", "named"),
    [
        ("text", {"scorer": "/nope"}, "metrics.scorer=/nope"),
        ("text", {"mauve": True}, "metrics.scorer"),
        ("responses", {"scorer": "/nope"}, "metrics.scorer=/nope"),
        ("images", {"inception": "/nope"}, "metrics.inception=/nope"),
        ("molecules", {"fcd": "perhaps"}, "fcd='perhaps'"),
        ("poems", {}, "domain='poems'.*molecules.*codes"),
    ],
)
def test_impossible_values_are_refused(name, keys, named):
    with pytest.raises(UserError, match=named):
        metrics_config(name, keys)
