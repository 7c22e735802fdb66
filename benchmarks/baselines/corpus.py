"""Conversion of text to blocks on disk and to batches, as in the examples of Hugging Face `datasets`, in one process.

It follows transformers' `run_clm.py`: `map` over lines with the tokenizer's batched call, `map` that concatenates and
cuts, an Arrow directory; then `with_format("torch")` under torch's DataLoader. The tokenizer is that of the library
`tokenizers`, without transformers' wrapper.

Legend: B batch, L length, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import tokenizers
from torch import Tensor
from torch.utils.data import DataLoader

END = "<|endoftext|>"


def tokenize(text: Path, tokenizer: Path, out: Path, length: int) -> datasets.Dataset:
    """Tokenize the lines of a file, each followed by `END`, and cut the stream into blocks of `length` tokens.

    The blocks are an Arrow table in `out / "blocks"`.
    """
    pipeline = tokenizers.Tokenizer.from_file(str(tokenizer))
    end = pipeline.token_to_id(END)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = pipeline.encode_batch(batch["text"], add_special_tokens=False)
        return {"tokens": [[*one.ids, end] for one in found]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        stream = list(chain(*batch["tokens"]))
        return {"tokens": [stream[at : at + length] for at in range(0, len(stream) // length * length, length)]}

    lines = datasets.load_dataset("text", data_files=str(text), split="train", cache_dir=str(out / "cache"))
    encoded = lines.map(encode, batched=True, remove_columns=["text"])
    blocks = encoded.map(group, batched=True)
    blocks.save_to_disk(str(out / "blocks"))
    return blocks


def save(tokens_NL: np.ndarray, out: Path) -> None:
    """Save samples as an Arrow directory."""
    datasets.Dataset.from_dict({"tokens": tokens_NL}).save_to_disk(str(out))


def batches(place: Path, batch_size: int) -> Iterator[Tensor]:
    """Yield shuffled batches (B, L), int64, of the samples that `save` wrote, endlessly."""
    table = datasets.load_from_disk(str(place)).with_format("torch")
    loader = DataLoader(table, batch_size=batch_size, shuffle=True, drop_last=True)
    while True:
        for batch in loader:
            yield batch["tokens"]
