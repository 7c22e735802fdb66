"""Conversations of different lengths on one and on two ranks: the same losses and weights with any padding."""

import json

import pytest

from scmdm.cli import main
from tests.chat_tokenizers import write_chat_tokenizer
from tests.conftest import TINY
from tests.distributed.launching import launch
from tests.distributed.parity import STEPS, assert_same


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("padding", "policy", "loss_per"),
    [("batch", "eos", "sample"), ("sample", "ignore", "token")],
)
def test_two_ranks_as_one(tmp_path, empty_yaml, padding, policy, loss_per):
    rows = []
    for i in range(60):
        turns = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}" * (i % 20 + 1)}]
        rows.append({"messages": turns * (1 + i % 2)})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["source.name=text", f"source.path={tmp_path / 'chats.jsonl'}", "source.messages_key=messages"]
    keys += ["tokenizer.name=huggingface", f"tokenizer.path={write_chat_tokenizer(tmp_path / 'tokenizer')}"]
    keys += ["length=160", "validation_fraction=0.2", "test_fraction=0.1", f"pad_policy={policy}", "workers=1"]
    data = tmp_path / "data"
    assert main(["prepare", str(empty_yaml), *keys, f"out={data}"]) == 0
    fixed = [f"data.path={data}", *TINY, "self_conditioning.rate=0.5", f"train.steps={STEPS}", "precision=float32"]
    fixed += [
        "train.global_batch_size=8",
        f"train.padding={padding}",
        "train.pad_multiple=4",
        f"train.loss_per={loss_per}",
    ]
    for run, ranks, micro in (("single", 0, 8), ("two", 2, 2)):
        own = [f"run_dir={tmp_path / run}", f"train.micro_batch_size={micro}"]
        status, output = launch(ranks, "train", str(empty_yaml), *fixed, *own)
        assert status == 0, output
    assert_same(tmp_path / "two", tmp_path / "single")
