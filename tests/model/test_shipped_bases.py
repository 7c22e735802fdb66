"""The models that are shipped as bases of the studies."""

from __future__ import annotations

from pathlib import Path

import pytest

from scmdm.model.weights import read_model

ROOT = Path(__file__).parents[2]
BASES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/base-model"))


def test_there_is_one_for_every_domain():
    assert [Path(base).parent.name for base in BASES] == ["genomes", "images", "qm9", "text"]


@pytest.mark.parametrize("base", BASES)
def test_a_shipped_base_loads(base):
    loaded = read_model(ROOT / base)

    assert loaded.spec.vocab_size == loaded.tokenizer.vocab_size
