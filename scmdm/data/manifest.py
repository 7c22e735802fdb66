"""Manifest of a prepared data set, and checks of its files against it.

`manifest.json` in the root directory describes the tokenizer, the special ids, every shard with size and SHA-256, and
the corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scmdm.data.tokenizers import load_tokenizer
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text, sha256_file

MANIFEST_FILE = "manifest.json"
REMOTE_FILE = "remote.json"  # marks the cache of a remote data set (see remote.py)
VERSION = 2


@dataclass
class TokenizerRef:
    """Tokenizer file of a data set."""

    kind: str
    file: str
    sha256: str


@dataclass
class FileInfo:
    """A shard, or streaming's index of shards."""

    file: str  # relative to the root
    bytes: int
    sha256: str


@dataclass
class SplitInfo:
    """Size and files of a split."""

    samples: int
    tokens: int  # number of tokens that count in the loss
    files: list[FileInfo]

    @staticmethod
    def parse(content: dict[str, Any]) -> SplitInfo:
        """Make a split from its JSON content."""
        return SplitInfo(content["samples"], content["tokens"], [FileInfo(**file) for file in content["files"]])


@dataclass
class Manifest:
    """A data set of `length` ids per sample."""

    version: int
    name: str
    tokenizer: TokenizerRef
    vocab_size: int
    mask_id: int
    pad_id: int
    bos_id: int
    eos_id: int
    length: int
    dtype: str  # of the stored ids
    pad_policy: str  # "loss": padding is predicted like any token; "ignore": it is left out of the loss
    bos_policy: str  # "given": [BOS] is never masked; "loss": it is a token like any other
    splits: dict[str, SplitInfo]
    source: dict[str, Any] = field(default_factory=dict)  # files with hashes, options
    counts: dict[str, int] = field(default_factory=dict)  # read, kept, dropped by reason
    labels: list[str] = field(default_factory=list)  # names of the classes of samples; empty: no classes
    # "records": one per sample; "concatenate": blocks of joined records; "packed": several per sample, numbered by
    # the column `documents`; "prompts": one after its prompt, whose length with [BOS] is in the column `given`
    framing: str = "records"

    @classmethod
    def read(cls, root: Path) -> Manifest:
        """Read the manifest of a directory. Raises UserError when it is missing, damaged or of another version."""
        path = root / MANIFEST_FILE
        try:
            content = json.loads(path.read_text())
            if content["version"] != VERSION:
                raise UserError(
                    f"{path} has version {content['version']}, expected {VERSION}; prepare the data set again"
                )
            content["tokenizer"] = TokenizerRef(**content["tokenizer"])
            content["splits"] = {name: SplitInfo.parse(split) for name, split in content["splits"].items()}
            return cls(**content)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{root} is not a prepared data set (no {MANIFEST_FILE}); run `scmdm prepare` first"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); prepare the data set again with overwrite=true") from error

    def write(self, root: Path) -> None:
        """Write the manifest of a directory."""
        atomic_write_text(root / MANIFEST_FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content, which is equal for equal data sets."""
        content = asdict(self)
        if not self.labels:
            del content["labels"]  # keep fingerprints from before there were labels
        if self.framing == "records":
            del content["framing"]  # and from before there were framings
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def split(self, name: str, root: Path) -> SplitInfo:
        """Return a split. Raises UserError, which lists the splits, for an unknown name."""
        if name not in self.splits:
            raise UserError(f"{root} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]


def remote_of(root: Path) -> str | None:
    """Return the URL of the data set that a directory caches; None when it is not a cache."""
    path = root / REMOTE_FILE
    try:
        return str(json.loads(path.read_text())["remote"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); remove it and give data.remote again") from error


def file_problems(root: Path, *, hashes: bool) -> list[str]:
    """List missing and damaged files of a data set; a cache may lack some.

    Without `hashes`, shards are checked by size alone.
    """
    manifest, cached = Manifest.read(root), remote_of(root) is not None
    files = [file for split in manifest.splits.values() for file in split.files]
    absent = {file.file for file in files if not (root / file.file).is_file()} if cached else set()
    problems = [p for file in files if file.file not in absent for p in _verify_file(root, file, hashes)]
    problems += _verify_tokenizer(root, manifest)
    if not problems:
        problems += [problem for name in manifest.splits for problem in _verify_index(root, name, manifest)]
    return problems


def check_dataset(root: Path) -> Manifest:
    """Check existence and sizes of the files, and return the manifest. Raises UserError for the first problem.

    In a cache, files of another size are removed and fetched again later.
    """
    if remote_of(root) is not None:
        _remove_damaged(root)
    problems = file_problems(root, hashes=False)
    if problems:
        raise UserError(f"{problems[0]}; restore the file, or prepare the data set again with overwrite=true")
    return Manifest.read(root)


def _remove_damaged(root: Path) -> None:
    for split in Manifest.read(root).splits.values():
        for file in split.files:
            path = root / file.file
            if path.is_file() and path.stat().st_size != file.bytes:
                path.unlink(missing_ok=True)  # another rank may have removed it


def _verify_file(root: Path, file: FileInfo, hashes: bool) -> Iterator[str]:
    path = root / file.file
    if not path.is_file():
        yield f"{path} is missing"
    elif path.stat().st_size != file.bytes:
        yield f"{path} has {path.stat().st_size} bytes instead of {file.bytes}"
    elif hashes and sha256_file(path) != file.sha256:
        yield f"{path} does not match its SHA-256"


def _verify_tokenizer(root: Path, manifest: Manifest) -> Iterator[str]:
    path = root / manifest.tokenizer.file
    if not path.is_file():
        yield f"tokenizer {path} is missing"
    elif sha256_file(path) != manifest.tokenizer.sha256:
        yield f"tokenizer {path} does not match its SHA-256 in {MANIFEST_FILE}"
    elif (size := load_tokenizer(path).vocab_size) != manifest.vocab_size:
        yield f"tokenizer {path} has {size} tokens, but {MANIFEST_FILE} gives {manifest.vocab_size}"


def _verify_index(root: Path, split: str, manifest: Manifest) -> Iterator[str]:
    path = root / split / "index.json"
    try:
        samples = sum(shard["samples"] for shard in json.loads(path.read_text())["shards"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        yield f"{path} is missing or damaged ({type(error).__name__})"
        return
    if samples != manifest.splits[split].samples:
        yield f"{path} lists {samples} samples, but {MANIFEST_FILE} gives {manifest.splits[split].samples}"
