"""Model descriptions that earlier versions wrote."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from scmdm.config.model import DENOISERS
from scmdm.config.run import RunConfig
from scmdm.errors import UserError
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.dit import DiTConfig
from scmdm.models.legacy import upgrade_model_keys
from scmdm.models.model_files import spec_of
from scmdm.training.setup import check_same_run

SHARED = {"width": 64, "layers": 2, "heads": 4, "mlp_ratio": 4, "self_conditioned": True, "estimate_rank": None}
OF_DIT = {"condition_width": 16, "time_conditioning": True, "labels": False}
SECTION = {"kv_heads": 2, "mlp_width": 96, "rotary_base": 5e5, "norm_eps": 1e-6, "tied": True, "logit_shift": True}
DECODER = {"kind": "llama", **SHARED, **OF_DIT, "llama": {**SECTION, "attention_bias": False}}
DIT = {"kind": "dit", **SHARED, **OF_DIT, "llama": {"kv_heads": None}}


def spec(model):
    return spec_of({"model": model, "diffusion": {}, "vocab_size": 9, "mask_id": 8, "length": 4}, "model.json")


def test_a_decoder():
    before = {**DECODER, "llama": dict(DECODER["llama"])}
    expected = DecoderConfig(width=64, layers=2, heads=4, self_conditioned=True, **SECTION)
    assert spec(DECODER).model == expected
    assert before == DECODER  # unchanged
    assert spec(DECODER).build().blocks[0].attn_k.weight.shape == (32, 64)


@pytest.mark.parametrize(("stored", "compile"), [(True, "block"), (False, "none"), ("trunk", "trunk")])
def test_compile_was_true_or_false(stored, compile):
    for described in (DIT, DECODER):
        assert spec({**described, "compile": stored}).model.compile == compile


@pytest.mark.parametrize("absent", [(), ("llama",), ("kind", "llama", "estimate_rank")])
def test_a_dit(absent):
    keys = {name: value for name, value in DIT.items() if name not in absent}
    expected = DiTConfig(width=64, layers=2, heads=4, self_conditioned=True, condition_width=16, time_conditioning=True)
    assert spec(keys).model == expected


@pytest.mark.parametrize("kind", DENOISERS.names)
def test_todays_descriptions_are_unchanged(kind):
    keys = dataclasses.asdict(DENOISERS.schema(kind)(head_width=6))
    assert upgrade_model_keys(keys) == keys


def test_an_old_run_is_resumed_with_its_own_keys_only(tmp_path):
    model = DecoderConfig(width=64, layers=2, heads=4, self_conditioned=True, **SECTION)
    config = RunConfig(run_dir="r", model=model)
    config.train.steps = 5
    content = {**dataclasses.asdict(config), "model": DECODER}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    check_same_run(config, tmp_path)
    wider = dataclasses.replace(config, model=dataclasses.replace(model, mlp_width=97))
    with pytest.raises(UserError, match=re.escape("model.mlp_width=97")):
        check_same_run(wider, tmp_path)
