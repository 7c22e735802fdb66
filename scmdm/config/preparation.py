"""Configuration of `scmdm prepare`, and the registries of its sources and tokenizers.

The keys of a source or a tokenizer are declared with its class, as the attribute `Config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from scmdm.config.fields import PathKind, key, require
from scmdm.config.registry import Registry

SOURCES = Registry(
    "source.name",
    "scmdm.sources",
    {
        "qm9": "data_prep.qm9:Qm9Source",
        "moses": "data_prep.moses:MosesSource",
        "smiles": "data_prep.smiles:SmilesSource",
        "text": "data_prep.text:TextSource",
        "huggingface": "data_prep.huggingface:HuggingFaceSource",
        "text8": "data_prep.text8:Text8Source",
        "genomes": "data_prep.genomes:GenomeSource",
        "proteins": "data_prep.proteins:ProteinSource",
        "cifar10": "data_prep.images:Cifar10Source",
        "idx": "data_prep.idx_images:IdxSource",
        "images": "data_prep.images:ImageSource",
        "digits": "data_prep.images:DigitSource",
        "codes": "data_prep.codes:CodeSource",
    },
)
TOKENIZERS = Registry(
    "tokenizer.name",
    "scmdm.tokenizers",
    {
        "smiles": "scmdm.data.tokenizers.symbol_tokenizer:SmilesTokenizer",
        "selfies": "scmdm.data.tokenizers.symbol_tokenizer:SelfiesTokenizer",
        "characters": "scmdm.data.tokenizers.symbol_tokenizer:CharacterTokenizer",
        "sentencepiece": "scmdm.data.tokenizers.sentencepiece_tokenizer:SentencePieceTokenizer",
        "bytes": "scmdm.data.tokenizers.byte_tokenizer:ByteTokenizer",
        "huggingface": "scmdm.data.tokenizers.huggingface_tokenizer:HuggingFaceTokenizer",
        "dna": "scmdm.data.tokenizers.symbol_tokenizer:DnaTokenizer",
        "amino_acids": "scmdm.data.tokenizers.symbol_tokenizer:AminoAcidTokenizer",
        "levels": "scmdm.data.tokenizers.level_tokenizer:LevelTokenizer",
        "codes": "scmdm.data.tokenizers.level_tokenizer:CodeTokenizer",
    },
)

# Choices of the text sources, which evaluation on texts shares.
TEXT_UNITS = ("passages", "documents", "lines", "rows")
TEXT_DETOKENIZERS = ("none", "wikitext", "lm1b", "ptb", "lambada", "scientific_papers")


@dataclass
class SectionConfig:
    """Base of the sections `source` and `tokenizer`.

    A manifest records the keys of a section that differ from their defaults, except those in `unrecorded`: it has
    the hashes of files instead of their paths.
    """

    unrecorded: ClassVar[frozenset[str]] = frozenset({"path"})

    name: str = key(MISSING, help="implementation that this section configures")

    def validate(self) -> None:
        """Raise UserError for impossible combinations of keys."""


@dataclass
class SourceConfig(SectionConfig):
    """Keys of a source. A source with keys of its own extends this class."""

    @property
    def framing(self) -> str | None:
        """Return the framing of records that are prompts and responses or chats; None: that of the data set."""
        return None

    @property
    def splits_by_name(self) -> bool:
        """Return whether the names of files or splits assign the records to splits, so that the fractions may be 0."""
        return False


@dataclass
class TokenizerConfig(SectionConfig):
    """Keys of a tokenizer. A tokenizer with keys of its own extends this class."""


def _is_compression(value: str | None) -> bool:
    return value is None or re.fullmatch(r"zstd(:([1-9]|1\d|2[0-2]))?", value) is not None


@dataclass
class PrepareConfig:
    """Configuration of `scmdm prepare`, which converts a corpus to a data set of token sequences."""

    out: str = key(MISSING, path=PathKind.OUTPUT, help="directory of the data set; it is created")
    source: SourceConfig = key(MISSING, help="corpus", registry=SOURCES)
    tokenizer: TokenizerConfig = key(MISSING, help="tokenizer", registry=TOKENIZERS)
    length: int = key(
        MISSING,
        help="ids per sample, including [BOS] and, where the tokenizer has one, [EOS]",
        at_least=4,
        at_most=2**24,
    )
    framing: str = key(
        "records",
        help="records: one per sample; concatenate: blocks of the joined records; packed: several records per sample",
        choices=("records", "concatenate", "packed"),
    )
    long_records: str = key(
        "cut",
        help="records of text that do not fit into a sample: cut into several samples, or truncate, which omits the "
        "rest (MDLM's LM1B)",
        choices=("cut", "truncate"),
    )
    pad_policy: str = key(
        "loss",
        help="loss: predict padding like any token; eos: likewise, and pad with [EOS] (LLaDA); ignore: never mask it, "
        "and omit it from the loss; masked: mask it like any token, and omit it from the loss (MDLM's LM1B)",
        choices=("loss", "eos", "ignore", "masked"),
    )
    bos_policy: str = key(
        "given",
        help="given: never mask [BOS] (rotary attention's only absolute position); loss: mask it like any token",
        choices=("given", "loss"),
    )
    validation_fraction: float = key(
        0.05,
        help="share of the records in the validation split (of the training set, if the source publishes that alone)",
        at_least=0,
        below=1,
    )
    test_fraction: float = key(
        0.05, help="share of the records in the test split, where the source publishes none", at_least=0, below=1
    )
    held_out_last: int | None = key(
        None,
        help="number of last records that form the validation split, without a test split; null: use the fractions",
        at_least=1,
        at_most=2**40,
    )
    split_seed: int | None = key(
        None,
        help="seed of a permutation whose first validation_fraction of the records is the validation split, without a "
        "test split, as train_test_split of datasets (42 for the published QM9); null: hashes decide",
        at_least=0,
        at_most=2**62,
    )
    limit: int | None = key(
        None, help="number of distinct records read, per published split; null: all", at_least=1, at_most=2**40
    )
    deduplicate: bool = key(True, help="keep only the first of equal records")
    on_dirty: str = key(
        "skip", help="unusable records: skip and count them, or refuse the corpus", choices=("skip", "refuse")
    )
    shard_mb: int = key(
        64, help="largest size of a shard in MiB (its format has 32-bit offsets)", at_least=1, at_most=4095
    )
    compression: str | None = key(
        None,
        help="compression of the shards: zstd, or zstd:LEVEL from 1 (fast) to 22 (small); null: none. Each shard is "
        "decompressed once, on the disk of the machine that reads it",
    )
    part_mb: int = key(
        64,
        help="MiB of raw files that one worker reads at a time; a shard never spans two parts",
        at_least=1,
        at_most=2**20,
    )
    upload: str | None = key(None, help="s3://bucket/prefix to copy the data set to, for data.remote of a run")
    overwrite: bool = key(False, help="replace a data set that was made with other settings")
    workers: int | None = key(
        None, help="number of processes, which does not change the result; null: one per CPU", at_least=1, at_most=4096
    )
    slice: str | None = key(
        None, help="INDEX/COUNT of this machine among those that share the work, such as 0/4 in a SLURM array"
    )

    def validate(self) -> None:
        """Raise UserError for impossible combinations of keys."""
        self.source.validate()
        self.tokenizer.validate()
        for name, value, ok, wanted in self._rules():
            require(ok, name, value, wanted)

    def _rules(self) -> Iterator[tuple[str, object, bool, str]]:
        """Yield keys, their values, whether these are possible, and the allowed values."""
        source, tokenizer = self.source, self.tokenizer
        supported = SOURCES.load(source.name).tokenizers
        yield (
            "tokenizer.name",
            tokenizer.name,
            tokenizer.name in supported,
            f"one of {', '.join(supported)} with source.name={source.name}",
        )
        for name in ("validation_fraction", "test_fraction"):
            fraction = getattr(self, name)
            yield name, fraction, fraction > 0 or source.splits_by_name, "above 0, unless source.split_by=names"
        total = self.validation_fraction + self.test_fraction
        yield "test_fraction", self.test_fraction, total < 1, "below 1 together with validation_fraction"
        by_name = "source.split_by=names" if hasattr(source, "split_by") else f"source.name={source.name}"
        together = self.held_out_last is not None and source.splits_by_name
        yield "held_out_last", self.held_out_last, not together, f"null with {by_name}"
        permuted = self.split_seed is not None and (source.splits_by_name or self.held_out_last is not None)
        permuted_by = by_name if source.splits_by_name else "held_out_last"
        yield "split_seed", self.split_seed, not permuted, f"null with {permuted_by}"
        padded = self.pad_policy == "ignore"
        yield (
            "pad_policy",
            self.pad_policy,
            self.pad_policy == "loss" or self.framing != "concatenate",
            "loss with framing=concatenate",
        )
        yield "pad_policy", self.pad_policy, padded or self.framing != "packed", "ignore with framing=packed"
        one_sample = self.framing == "records" and source.framing is None
        whole = SOURCES.load(source.name).whole_records or not one_sample
        shortened = self.long_records == "truncate"
        yield "long_records", self.long_records, not (shortened and whole), "cut, except for text with framing=records"
        alone = self.framing == "records" or source.framing is None
        yield "framing", self.framing, alone, "records with source.response_key"
        yield "compression", self.compression, _is_compression(self.compression), "null, zstd, or zstd:1 to zstd:22"
        compressible = self.compression is None or self.shard_mb < 2048  # the compressor takes less than 2 GiB
        yield "shard_mb", self.shard_mb, compressible, "at most 2047 with compression"
        yield "slice", self.slice, self.machine[0] < self.machine[1], "INDEX/COUNT with INDEX below COUNT"
        replaced = self.overwrite and self.slice is not None
        yield "overwrite", self.overwrite, not replaced, "false with slice: remove the old data set first"

    @property
    def machine(self) -> tuple[int, int]:
        """Index and count of the machines; (0, 0) when `slice` is malformed."""
        if self.slice is None:
            return 0, 1
        found = re.fullmatch(r"(\d+)/(\d+)", self.slice)
        return (int(found[1]), int(found[2])) if found else (0, 0)
