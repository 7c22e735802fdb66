"""MAUVE where it is known, features of a real causal model."""

import sys

import numpy as np
import pytest
import torch

from scmdm.domains.text.causal_scorer import load_scorer
from scmdm.domains.text.mauve_score import mauve, mauve_of_features, text_features
from scmdm.errors import UserError
from tests.domains.test_text import TEXTS, scorer  # noqa: F401 (a fixture)


def test_features_are_the_last_hidden_states(scorer):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(scorer).eval(), AutoTokenizer.from_pretrained(scorer)
    found = text_features([*TEXTS, ""], load_scorer(scorer), batch_size=2)
    for text, feature in zip(TEXTS, found, strict=False):
        with torch.no_grad():
            states = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(feature, states[0, -1], rtol=1e-4, atol=1e-5)
    assert not found[-1].any()


def test_the_same_and_the_disjoint():
    """Without any overlap the curve is ((1 - l)^5, l^5), and the area under it 5 B(6, 5) = 1/252."""
    pytest.importorskip("mauve")
    dice = np.random.default_rng(0)
    noise = 0.05 * dice.standard_normal((2, 200, 8)).astype(np.float32)
    ahead = np.eye(8, dtype=np.float32)[0]
    one, other = noise[0] + ahead, noise[1] - ahead
    assert mauve_of_features(one, one) == pytest.approx(1.0)
    assert mauve_of_features(one, other) == pytest.approx(1 / 252, rel=0.1)


def test_what_is_missing_is_named(scorer, monkeypatch):  # noqa: F811
    with pytest.raises(UserError, match="0 and 5"):
        mauve([], TEXTS, load_scorer(scorer))
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(UserError, match=r"scmdm\[text\]"):
        mauve(TEXTS, TEXTS, load_scorer(scorer))
