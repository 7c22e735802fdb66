"""The data baselines produce the same blocks as scmdm, without which ratios would be meaningless."""

from itertools import islice

import numpy as np
import pytest

from benchmarks.loader import read_batches, write
from benchmarks.preparation import options, train_tokenizer, write_text
from scmdm.config.loading import load_config
from scmdm.config.preparation import PrepareConfig
from scmdm.data.loader import read_split
from scmdm.data.preparation.prepare import prepare

corpus = pytest.importorskip("benchmarks.baselines.corpus", reason="needs datasets")


def test_an_epoch_of_either_loader_holds_the_same_samples(tmp_path):
    ids_NL = np.random.default_rng(0).integers(4, 34, (64, 6), np.uint16)
    write(tmp_path, "data", ids_NL, 1)
    corpus.save(ids_NL, tmp_path / "arrow")
    ours = [batch["tokens"] for batch in islice(read_batches(tmp_path / "data", 16), 4)]
    theirs = list(islice(corpus.batches(tmp_path / "arrow", 16), 4))
    assert ours[0].dtype == theirs[0].dtype and ours[0].shape == theirs[0].shape == (16, 6)
    rows = [sorted(row for batch in found for row in batch.tolist()) for found in (ours, theirs)]
    assert rows[0] == rows[1] == sorted(ids_NL.tolist())
    assert [row for batch in theirs for row in batch.tolist()] != ids_NL.tolist(), "shuffled"


def test_both_preparations_make_the_same_stream_of_tokens(tmp_path):
    """Ours puts marks around each block and holds the last lines out; what is between the marks is the stream."""
    text = write_text(tmp_path / "text.txt", 60_000)
    tokenizer = train_tokenizer(text, tmp_path / "tokenizer.json")
    keys = [f"{key}={value}" for key, value in options(text, tokenizer, tmp_path / "ours", 1, length=66).items()]
    prepare(load_config(PrepareConfig, None, keys))
    theirs = np.array(corpus.tokenize(text, tokenizer, tmp_path / "theirs", 64)["tokens"]).ravel()
    ours = read_split(tmp_path / "ours", "train")[:, 1:-1].ravel()
    assert len(ours) > 0.85 * len(theirs) > 5_000
    assert np.array_equal(ours, theirs[: len(ours)])
