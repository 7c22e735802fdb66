"""A LLaMA-like base straight from its published files into shards, and adapted there."""

import pytest

from scmdm.cli import main
from tests.conftest import ADAPTED
from tests.convert.published import write_texts
from tests.convert.test_decoder_layouts import write_published
from tests.distributed.launching import launch
from tests.distributed.parity import STEPS, assert_same


@pytest.mark.slow
def test_an_imported_model_adapts_on_two_ranks_as_on_one(tmp_path, empty_yaml):
    """Files of 20 kB in bfloat16, read into FSDP2's float32 shards; recomputed blocks, both passes, a shifted head."""
    write_published(tmp_path / "there", "dream", scale=0.1)  # larger weights make training chaotic
    base, data, text = tmp_path / "base", tmp_path / "data", write_texts(tmp_path / "text.jsonl")
    assert main(["import", str(tmp_path / "there"), str(base), "length=16", "bos_policy=given"]) == 0
    keys = [
        "source.name=text",
        f"source.path={text}",
        "tokenizer.name=huggingface",
        "framing=concatenate",
        "validation_fraction=0.1",
        "test_fraction=0.1",
        "length=16",
    ]
    keys += [f"tokenizer.path={base}/tokenizer.json", f"out={data}"]
    assert main(["prepare", str(empty_yaml), *keys]) == 0
    fixed = [f"base={base}", f"data.path={data}", *ADAPTED, "self_conditioning.rate=1", f"train.steps={STEPS}"]
    fixed += ["precision=float32", "train.global_batch_size=8", "optimizer.lr=1e-3"]
    for run, ranks, own in (
        ("single", 0, ["train.micro_batch_size=8"]),
        ("sharded", 2, ["train.micro_batch_size=4", "model.activation_checkpointing=full"]),
    ):
        status, output = launch(ranks, "adapt", str(empty_yaml), f"run_dir={tmp_path / run}", *fixed, *own)
        assert status == 0, output
    assert_same(tmp_path / "sharded", tmp_path / "single")
