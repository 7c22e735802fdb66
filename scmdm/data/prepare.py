"""`scmdm prepare`: records of a source -> tokenizer -> sequences -> splits -> shards."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import track

from scmdm.config.prepare import PrepareConfig
from scmdm.data.manifest import Manifest
from scmdm.data.remote import upload_dataset
from scmdm.data.shards import Description, is_up_to_date, write_dataset
from scmdm.data.tokenizers import SentencePieceTokenizer, SymbolTokenizer, Tokenizer
from scmdm.errors import UserError
from scmdm.files import sha256_file

SPLITS = ("train", "validation", "test")
_NOT_IN_SOURCE = ("out", "path", "overwrite", "upload")


class Source(Protocol):
    """One corpus: a module of `data_prep`."""

    name: str
    whole_records: bool  # a record is one sample (a molecule) or is cut into several (text)

    def files(self) -> dict[str, Path]:
        """The raw files by a name that does not depend on where they are, in reading order."""
        ...

    def records(self, counts: Counter[str], on_record: Callable[[], None]) -> Iterable[str]:
        """Clean records in a fixed order, none twice; what is left out is counted by reason."""
        ...


@dataclass(frozen=True)
class _Corpus:
    splits: dict[str, list[str]]

    def all(self) -> Iterable[str]:
        return (text for texts in self.splits.values() for text in texts)


def prepare(config: PrepareConfig) -> Manifest:
    """Make the data set that `config` describes, or find that it is there already; upload it if that is wanted."""
    manifest = _prepare_local(config)
    if config.upload is not None:
        upload_dataset(Path(config.out), config.upload)
        Console().print(f"uploaded to {config.upload}", highlight=False, soft_wrap=True)
    return manifest


def _prepare_local(config: PrepareConfig) -> Manifest:
    console = Console()
    root = Path(config.out)
    source = _make_source(config)
    options = {key: value for key, value in asdict(config).items() if key not in _NOT_IN_SOURCE}
    described = {
        "name": source.name,
        "files": {name: sha256_file(path) for name, path in source.files().items()},
        "options": options,
    }
    if is_up_to_date(root, described, config.overwrite):
        console.print(f"{root} is up to date", highlight=False, soft_wrap=True)
        return Manifest.read(root)
    counts: Counter[str] = Counter()
    corpus = _read(source, config, counts)
    tokenizer = _fit(config, corpus)
    console.print(f"{tokenizer.kind} tokenizer with {tokenizer.vocab_size} ids", highlight=False)
    sequences = {}
    for name, texts in corpus.splits.items():
        shown = track(texts, description=f"encoding {name}", console=console, disable=not console.is_terminal)
        sequences[name] = _encode(shown, tokenizer, config.length, source.whole_records, counts)
    description = Description(
        source.name, config.length, config.pad_policy, config.bos_policy, described, dict(sorted(counts.items()))
    )
    manifest = write_dataset(
        root, tokenizer, sequences, description, shard_bytes=config.shard_mb << 20, overwrite=config.overwrite
    )
    _summarise(console, root, manifest)
    return manifest


def _make_source(config: PrepareConfig) -> Source:
    if config.source == "qm9":
        from data_prep.qm9 import Qm9

        return Qm9()
    from data_prep.text import TextFolder, shakespeare

    return shakespeare() if config.path is None else TextFolder(Path(config.path), config.text_key)


def _read(source: Source, config: PrepareConfig, counts: Counter[str]) -> _Corpus:
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    console = Console()
    with console.status(f"reading {source.name}") as status:

        def show() -> None:
            if counts["read"] % 10_000 == 0:
                status.update(f"reading {source.name}: {counts['read']:,} records")

        for record in itertools.islice(source.records(counts, show), config.limit):
            splits[split_of(record, config.validation_fraction, config.test_fraction)].append(record)
    if not any(splits.values()):
        raise UserError(f"{source.name} holds no usable record ({dict(counts)}); give a corpus with text in it")
    return _Corpus(splits)


def split_of(record: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a record: a hash of its text, so that it never changes when records are added or reordered."""
    u = int.from_bytes(hashlib.sha256(record.encode()).digest()[:8], "big") / 2**64
    if u < test_fraction:
        return "test"
    return "validation" if u < test_fraction + validation_fraction else "train"


def _fit(config: PrepareConfig, corpus: _Corpus) -> Tokenizer:
    """Symbols come from all splits (an unknown one could not be encoded), sentencepiece from the training split."""
    if config.tokenizer == "sentencepiece":
        return SentencePieceTokenizer.fit(corpus.splits["train"], config.vocab_size)
    return SymbolTokenizer.fit(config.tokenizer, corpus.all())


def _encode(
    texts: Iterable[str], tokenizer: Tokenizer, length: int, whole_records: bool, counts: Counter[str]
) -> list[list[int]]:
    sequences = []
    for text in texts:
        ids = tokenizer.encode(text)
        if whole_records and len(ids) > length - 2:
            counts["dropped: too long"] += 1
            continue
        counts["kept"] += 1
        sequences += wrap(ids, length, tokenizer)
    return sequences


def wrap(ids: Sequence[int], length: int, tokenizer: Tokenizer) -> list[list[int]]:
    """`[BOS] ids [EOS]`, cut into as many sequences of at most `length` as it takes (MDLM's chunks)."""
    size = length - 2
    return [[tokenizer.bos_id, *ids[at : at + size], tokenizer.eos_id] for at in range(0, len(ids), size)]


def _summarise(console: Console, root: Path, manifest: Manifest) -> None:
    for name, split in manifest.splits.items():
        text = f"{name:<12}{split.samples:>10,} sequences {split.tokens:>13,} tokens {len(split.files) - 1:>4} shards"
        console.print(text, highlight=False)
    records = ", ".join(f"{k} {v:,}" for k, v in manifest.counts.items())
    console.print(f"records: {records}", highlight=False, soft_wrap=True)
    console.print(f"wrote {root}", highlight=False, soft_wrap=True)
