"""Manifest of a prepared data set, and checks of its files against it.

`manifest.json` in the root directory describes the tokenizer, the special ids, every shard with size and SHA-256, and
the corpus. It ends with its own fingerprint, so that a changed value is found. The directory may come from a stranger:
`Manifest.read` refuses unknown, missing and impossible values, and names of files outside of the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text
from scmdm.system.untrusted import name_inside, parse_as, read_json, require_plain_name

MANIFEST_FILE = "manifest.json"
REMOTE_FILE = "remote.json"  # marks the cache of a remote data set (see remote.py)
INDEX_FILE = "index.json"  # of a split: streaming's list of its shards
VERSION = 2
_FINGERPRINT = "fingerprint"  # key of the manifest; absent in those of earlier versions
_LARGEST_REMOTE = 2**16  # bytes of `remote.json`


def _one_of(*choices: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"it must be one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Bytes = Annotated[int, Field(ge=0, le=2**32)]  # shards have 32-bit offsets
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class TokenizerRef:
    """Tokenizer file of a data set."""

    kind: str
    # Copied into checkpoints and exports, where no other file may have its name.
    file: Annotated[str, Field(pattern=r"^tokenizer\.[A-Za-z0-9]+$")]
    sha256: Sha256


@dataclass(frozen=True)
class FileInfo:
    """A shard, or streaming's index of shards."""

    file: str  # relative to the root: SPLIT/NAME
    bytes: Bytes
    sha256: Sha256


@dataclass(frozen=True)
class SplitInfo:
    """Size and files of a split."""

    samples: Count
    tokens: Count  # number of tokens that count in the loss
    files: list[FileInfo]


@dataclass(frozen=True)
class Manifest:
    """A data set of `length` ids per sample."""

    version: int
    name: str
    tokenizer: TokenizerRef
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    mask_id: int
    pad_id: int
    bos_id: int
    eos_id: int
    length: Annotated[int, Field(ge=1, le=2**24)]
    dtype: Annotated[str, _one_of("uint16", "uint32")]  # of the stored ids
    # "loss": padding is masked and predicted like any token; "eos": likewise, and it is [EOS]; "ignore": it is neither
    # masked nor in the loss; "masked": it is masked, but not in the loss
    pad_policy: Annotated[str, _one_of("loss", "eos", "ignore", "masked")]
    # "given": [BOS] is never masked; "loss": it is a token like any other
    bos_policy: Annotated[str, _one_of("given", "loss")]
    splits: dict[str, SplitInfo]
    source: dict[str, Any] = field(default_factory=dict)  # files with hashes, options
    counts: dict[str, Count] = field(default_factory=dict)  # read, kept, dropped by reason
    labels: list[str] = field(default_factory=list)  # names of the classes of samples; empty: no classes
    # "records": one per sample; "concatenate": blocks of joined records; "packed": several per sample, numbered by
    # the column `documents`; "prompts": one after its prompt, whose length with [BOS] is in the column `given`;
    # "chats": a conversation in the form of the tokenizer's chat template, with the column `given_mask`
    framing: Annotated[str, _one_of("records", "concatenate", "packed", "prompts", "chats")] = "records"

    @classmethod
    def read(cls, root: Path) -> Manifest:
        """Read the manifest of a directory. Raises UserError when it is missing, damaged or of another version."""
        return _read(root)[0]

    def write(self, root: Path) -> None:
        """Write the manifest of a directory."""
        content = {**asdict(self), _FINGERPRINT: self.fingerprint()}
        atomic_write_text(root / MANIFEST_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content, which is equal for equal data sets."""
        content = dict(vars(self))
        if not self.labels:
            del content["labels"]  # keep fingerprints from before there were labels
        if self.framing == "records":
            del content["framing"]  # and from before there were framings
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=vars).encode()).hexdigest()

    @property
    def has_prompts(self) -> bool:
        """Whether samples are answers to prompts, which are never masked."""
        return self.framing in ("prompts", "chats")

    @property
    def counts_padding(self) -> bool:
        """Whether padding is in the loss."""
        return self.pad_policy in ("loss", "eos")

    @property
    def padding_id(self) -> int:
        """Id that samples are padded with."""
        return padding_id(self.pad_policy, pad_id=self.pad_id, eos_id=self.eos_id)

    def split(self, name: str, root: Path) -> SplitInfo:
        """Return a split. Raises UserError, which lists the splits, for an unknown name."""
        if name not in self.splits:
            raise UserError(f"{root} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]


def remedy_for(root: Path) -> str:
    """Return what a user does about a damaged file of a data set, or of the cache of one."""
    if os.path.lexists(root / REMOTE_FILE):
        return "remove the file, and give data.remote again, which fetches it"
    return "restore the file, or prepare the data set again with overwrite=true"


def padding_id(pad_policy: str, *, pad_id: int, eos_id: int) -> int:
    """Return the id that the samples of a data set are padded with."""
    return eos_id if pad_policy == "eos" else pad_id


def has_fingerprint(root: Path) -> bool:
    """Return whether the manifest of a directory has its own fingerprint, as all but those of earlier versions."""
    return _read(root)[1]


def _read(root: Path) -> tuple[Manifest, bool]:
    """Read a manifest, and return it with whether it had a fingerprint."""
    path, remedy = root / MANIFEST_FILE, remedy_for(root)
    try:
        content = read_json(path, "manifest", remedy=remedy)
    except FileNotFoundError as error:
        raise UserError(f"{root} is not a prepared data set (no {MANIFEST_FILE}); run `scmdm prepare` first") from error
    version = content.get("version", VERSION) if isinstance(content, dict) else VERSION
    if version != VERSION:
        raise UserError(f"{path} has version {version!r:.40}, expected {VERSION}; prepare the data set again")
    fingerprinted = isinstance(content, dict) and _FINGERPRINT in content
    recorded = content.pop(_FINGERPRINT) if fingerprinted else None
    manifest = parse_as(Manifest, content, path, remedy)
    _check_ids(manifest, path, remedy)
    _check_names(manifest, root, remedy)
    if fingerprinted and recorded != manifest.fingerprint():
        raise UserError(f"{path} was changed after it was written: it does not match its {_FINGERPRINT}; {remedy}")
    return manifest, fingerprinted


def _check_ids(manifest: Manifest, path: Path, remedy: str) -> None:
    """Raise UserError for special ids outside of the vocabulary, and for ids that the dtype cannot hold."""
    for name in ("mask_id", "pad_id", "bos_id", "eos_id"):
        value = getattr(manifest, name)
        if not 0 <= value < manifest.vocab_size:
            raise UserError(
                f"{path}: {name}={value} is not possible; it must be between 0 and {manifest.vocab_size - 1}; {remedy}"
            )
    if manifest.dtype == "uint16" and manifest.vocab_size > 1 << 16:
        raise UserError(
            f"{path}: dtype=uint16 is not possible with vocab_size={manifest.vocab_size}; it must be uint32; {remedy}"
        )


def _check_names(manifest: Manifest, root: Path, remedy: str) -> None:
    """Raise UserError unless all files are named once, plainly, in the directory of their split inside `root`."""
    path = root / MANIFEST_FILE
    name_inside(root, manifest.tokenizer.file, path)
    for split, info in manifest.splits.items():
        if name_inside(root, split, path).parent != root:
            raise UserError(f"{path} has a split {split!r:.100}, which is not the name of a directory; {remedy}")
        for file in info.files:
            require_plain_name(file.file, root, path)
            if file.file.rpartition("/")[0] != split:
                raise UserError(
                    f"{path}: split {split!r} lists {file.file!r:.100}, which is not in its directory; {remedy}"
                )
    named = Counter(file.file for split in manifest.splits.values() for file in split.files)
    twice = [name for name, count in named.items() if count > 1]
    if twice:
        raise UserError(f"{path} lists {twice[0]!r} twice; {remedy}")


@dataclass(frozen=True)
class _Remote:
    """Content of `remote.json`."""

    remote: Annotated[str, Field(min_length=1)]
    sha256: Sha256 = ""  # of `remote`; absent in files of earlier versions


def remote_of(root: Path) -> str | None:
    """Return the URL of the data set that a directory caches; None when it is not a cache."""
    path, remedy = root / REMOTE_FILE, f"remove it and {MANIFEST_FILE}, and give data.remote again"
    try:
        content = read_json(path, "mark of a cache", limit=_LARGEST_REMOTE, remedy=remedy)
    except FileNotFoundError:
        return None
    found = parse_as(_Remote, content, path, remedy)
    if found.sha256 and found.sha256 != _sha256(found.remote):
        raise UserError(f"{path} was changed after it was written; {remedy}")
    return found.remote


def mark_as_cache(root: Path, remote: str) -> None:
    """Write that a directory is the cache of the data set at `remote`."""
    atomic_write_text(root / REMOTE_FILE, json.dumps(asdict(_Remote(remote, _sha256(remote)))) + "\n")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
