"""The base models in `configs`."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from scmdm.checkpoint.seal import verify_checkpoint
from scmdm.cli import main
from scmdm.data.manifest import Manifest
from scmdm.models.model_files import read_model

ROOT = Path(__file__).parents[2]
BASES = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/*/weights.safetensors"))


def test_there_is_one_for_every_domain():
    small = [base for base in BASES if base.endswith("/base-model")]
    assert [Path(base).parent.name for base in small] == ["genomes", "images", "qm9", "text"]


@pytest.mark.parametrize("base", BASES)
def test_a_shipped_base_is_as_it_was_sealed_and_loads(base):
    assert verify_checkpoint(ROOT / base) == []
    loaded = read_model(ROOT / base)
    assert loaded.spec.vocab_size == loaded.tokenizer.vocab_size


def prepared_for():
    """What the studies prepare for each shipped base."""
    studies = (OmegaConf.load(path) for path in ROOT.glob("configs/*/*.yaml"))
    return sorted({(study.prepare, study.base) for study in studies if study.get("base") in BASES})


@pytest.mark.slow
@pytest.mark.parametrize(("prepare", "base"), prepared_for())
def test_what_a_study_prepares_fits_its_base(prepare, base, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["prepare", prepare, f"out={tmp_path / 'data'}"]) == 0
    expected, found = Manifest.read(ROOT / base), Manifest.read(tmp_path / "data")
    assert found.tokenizer.sha256 == expected.tokenizer.sha256
    assert (found.vocab_size, found.length) == (expected.vocab_size, expected.length)
