"""Small data sets of several shards, written directly."""

import hashlib
import random

from scmdm.data.preparation.shard_writer import Description, write_dataset
from scmdm.data.preparation.splits import leading_bits, split_of_hash
from scmdm.data.tokenizers import CharacterTokenizer

SPLITS = ("train", "validation", "test")


def write_texts(
    root, samples, *, seed=0, length=8, shard_bytes=2000, symbols="abcdefgh", pad_policy="loss", bos_policy="given",
    compression=None,
):  # fmt: skip
    """Framed random texts: `samples` for training, a fifth of that for validation and for test."""
    tokenizer, dice = CharacterTokenizer(symbols), random.Random(seed)

    def text():
        return [1, *(4 + dice.randrange(len(symbols)) for _ in range(dice.randint(1, length - 2))), 2]

    counts = dict.fromkeys(SPLITS, samples // 5) | {"train": samples}
    splits = {name: [text() for _ in range(count)] for name, count in counts.items()}
    description = Description(root.name, length, pad_policy, bos_policy, {"seed": seed})
    write_dataset(root, tokenizer, splits, description, shard_bytes=shard_bytes, compression=compression)
    return root


def split_of(text, validation_fraction, test_fraction):
    """The split of a text whose source publishes none."""
    return split_of_hash(leading_bits(hashlib.sha256(text.encode()).digest()), validation_fraction, test_fraction)
