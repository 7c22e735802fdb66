"""Tokenizers of the `tokenizers` library, as models on the Hugging Face hub have them: GPT-2's BPE and others.

Specials that a tokenizer has keep their ids. Those that it lacks are appended behind its vocabulary, the mask first:
GPT-2's tokenizer gets bos = eos = 50256 (`<|endoftext|>`) and mask = 50257, as MDLM's models have it (arXiv
2406.07524).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

from scmdm.data.tokenizers.base import Content, as_text, text_ids
from scmdm.data.tokenizers.word_cache import WordEncoder, words_are_apart
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text

# Names that specials have in tokenizers which do not say what they are for.
_NAMES = {
    "mask": ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>"),
    "bos": ("[BOS]", "<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("[EOS]", "</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
}
_OTHER_ROLES = {"bos": "cls", "eos": "sep"}  # of BERT's tokenizers
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class SpecialIds:
    mask: int
    bos: int
    eos: int
    pad: int


class HuggingFaceTokenizer:
    """A `tokenizers` pipeline with four special ids, which no text can spell."""

    kind = "huggingface"

    def __init__(self, pipeline: Mapping[str, Any], specials: SpecialIds, vocab_size: int = 0) -> None:
        """`vocab_size`: as many ids at least, the last of which no text has (rows that pad a model's embedding)."""
        self._pipeline, self._specials = pipeline, specials
        self._tokenizer = _pipeline(pipeline)
        self._encode = WordEncoder(self._library_ids) if words_are_apart(pipeline) else self._library_ids
        self.mask_id, self.bos_id, self.eos_id, self.pad_id = specials.mask, specials.bos, specials.eos, specials.pad
        self._known = _size(self._tokenizer)
        used = max(self._known, *(i + 1 for i in asdict(specials).values()))
        self.vocab_size, self._padded = max(used, vocab_size), vocab_size > used

    @classmethod
    def open(cls, path: Path, *, padded: bool, rows: int = 0, mask_id: int | None = None) -> HuggingFaceTokenizer:
        """Read a `tokenizer.json`, or a folder with the files of a `transformers` tokenizer.

        A tokenizer that has no padding of its own gets an id for it only when the data set is `padded`; without,
        padding is the end mark, which then no sample is padded with. `rows` and `mask_id` are those of a model whose
        tokenizer it is. Raises UserError.
        """
        folder = path.parent if path.is_file() else path
        if any((folder / name).is_file() for name in _SETTINGS):
            path = folder
        elif (folder / "tokenizer.json").is_file() and path.is_dir():
            path = folder / "tokenizer.json"  # `transformers` would ask the model's configuration for the kind
        pipeline, named = _from_folder(path) if path.is_dir() else (_from_file(path), {})
        ids = _pipeline(pipeline)
        found = {role: named.get(role) for role in _NAMES}
        if not named:
            found = {
                role: next((n for n in names if ids.token_to_id(n) is not None), None) for role, names in _NAMES.items()
            }
        return cls(pipeline, _special_ids(ids, found, padded, mask_id), rows)

    def encode(self, content: Content) -> list[int]:
        return self._encode(as_text(content))

    def _library_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in text_ids(ids, self) if i < self._known], skip_special_tokens=False)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        appended = {self.pad_id: "[PAD]", self.eos_id: "[EOS]", self.bos_id: "[BOS]", self.mask_id: "[MASK]"}
        return [self._tokenizer.id_to_token(int(i)) or appended.get(int(i), "") for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        content = {"kind": self.kind, "specials": asdict(self._specials), "pipeline": self._pipeline}
        if self._padded:
            content["vocab_size"] = self.vocab_size
        atomic_write_text(path, json.dumps(content, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> HuggingFaceTokenizer:
        """What `save` has written. Raises KeyError, TypeError or ValueError when it is not that."""
        return cls(content["pipeline"], SpecialIds(**content["specials"]), int(content.get("vocab_size", 0)))

    @property
    def pipeline(self) -> Mapping[str, Any]:
        """As the `tokenizers` library writes it."""
        return self._pipeline


def _pipeline(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """As it is saved, but what looks like a special token in a text is text."""
    try:
        found = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"no tokenizer of the tokenizers library: {error}") from error
    found.no_padding()
    found.no_truncation()
    found.encode_special_tokens = True
    return found


def _size(tokenizer: tokenizers.Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _special_ids(
    tokenizer: tokenizers.Tokenizer, names: Mapping[str, str | None], padded: bool, mask_id: int | None
) -> SpecialIds:
    """The ids of the names, and those behind the vocabulary for what has none."""
    ids = {role: tokenizer.token_to_id(name) for role, name in names.items() if name is not None}
    end = _size(tokenizer)
    found: dict[str, int] = {} if mask_id is None else {"mask": mask_id}
    for role in (role for role in _NAMES if role not in found):
        own = ids.get(role)
        # Many tokenizers without padding name another special for it.
        if own is not None and not (role in ("mask", "pad") and own in (ids.get("bos"), ids.get("eos"))):
            found[role] = own
        elif role == "pad" and not padded:
            found[role] = found["eos"]
        else:
            found[role] = end
            end += 1
    return SpecialIds(**found)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        _pipeline(content)
    except FileNotFoundError as error:
        raise UserError(
            f"tokenizer_path={path} does not exist; give a tokenizer.json, or a transformers tokenizer's folder"
        ) from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer_path={path} is no tokenizer.json: {reason}; give one") from error
    return content


def _from_folder(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The pipeline, and the names of its specials by role."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, use_fast=True, trust_remote_code=False)
        pipeline = json.loads(loaded.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer_path={path} holds no tokenizer that transformers can load: {reason}") from error
    names = {role: getattr(loaded, f"{role}_token") for role in _NAMES}
    for role, other in _OTHER_ROLES.items():
        names[role] = names[role] or getattr(loaded, f"{other}_token")
    return pipeline, {role: name for role, name in names.items() if name is not None}
