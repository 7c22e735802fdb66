"""Tokenizers of the `tokenizers` library, such as GPT-2's byte-level BPE.

A special that the tokenizer defines keeps its id. Missing specials are appended to the vocabulary, the mask first:
GPT-2's tokenizer gets bos = eos = 50256 (`<|endoftext|>`) and mask = 50257, as in MDLM's models (arXiv 2406.07524).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from omegaconf import MISSING

from scmdm.config.fields import PathKind, key, shorten
from scmdm.config.preparation import TokenizerConfig
from scmdm.data.tokenizers.base import Content, GridLayout, Tokenizer, UnknownSymbol, as_text, check_ids, text_ids
from scmdm.data.tokenizers.chat_template import LARGEST_TEMPLATE, PROBE, ChatTemplate, UnusableChat
from scmdm.data.tokenizers.pipeline import PipelineEncoder, load_pipeline, panics_as_errors, require_stated_ids
from scmdm.data.tokenizers.tokenizer_file import is_tokenizer_file, load_tokenizer, open_tokenizer_file
from scmdm.data.tokenizers.transformers_folder import (
    MAP_FILE,
    PIPELINE_FILE,
    SETTINGS_FILE,
    read_folder,
    write_folder,
)
from scmdm.data.tokenizers.word_cache import WordEncoder, splits_at_white_space
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text
from scmdm.system.untrusted import describe, parse_as, read_bytes, read_json, reading

logger = logging.getLogger("scmdm")
# Conventional names of specials, for tokenizers whose files do not assign roles.
_NAMES = {
    "mask": ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>"),
    "bos": ("[BOS]", "<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("[EOS]", "</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
}
_CHAT_FILE, _GENERATION_FILE = "chat_template.jinja", "generation_config.json"
_SETTINGS = (SETTINGS_FILE, MAP_FILE)


@dataclass
class HuggingFaceConfig(TokenizerConfig):
    """Keys of Hugging Face tokenizers."""

    path: str = key(
        MISSING,
        path=PathKind.INPUT,
        formerly=("tokenizer_path",),
        help="tokenizer.json, or the folder of a transformers tokenizer",
    )


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the specials."""

    mask: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class ModelIds:
    """What a model says about the tokens of its embedding.

    Attributes:
        rows: Rows of the embedding.
        mask: Id of the mask; None: `stated_mask`, that of the tokenizer, or the first unused id.
        stated_mask: Id of the mask in the model's configuration, from which that of the tokenizer must not differ.
        bos: Id of the token that begins a sample; None: that of the tokenizer.
        default_bos: Id of the token that begins a sample where the tokenizer has none. [EOS] is used unless this is
            a special token.
        ends: Ids of all tokens that end a text.
    """

    rows: int
    mask: int | None = None
    bos: int | None = None
    default_bos: int | None = None
    ends: tuple[int, ...] = ()
    stated_mask: int | None = None


@dataclass(frozen=True)
class _HuggingFaceFile:
    kind: str
    specials: SpecialIds
    pipeline: dict[str, Any]
    vocab_size: int = 0
    chat_template: str | None = None
    end_ids: tuple[int, ...] = ()


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of the `tokenizers` library. The names of tokens that its file marks as special are ordinary text.

    Args:
        pipeline: content of its `tokenizer.json`.
        specials: ids of the specials.
        vocab_size: lower bound of the vocabulary size, for models whose embedding has unused rows.
        chat_template: Jinja program that writes conversations; None: the tokenizer has none.
        end_ids: ids that end a sample besides that of [EOS] and of the token after an answer.
    """

    Config = HuggingFaceConfig
    kind = "huggingface"

    def __init__(
        self,
        pipeline: Mapping[str, Any],
        specials: SpecialIds,
        vocab_size: int = 0,
        chat_template: str | None = None,
        end_ids: Sequence[int] = (),
    ) -> None:
        self._pipeline, self._specials = pipeline, specials
        self.chat_template, self._end_ids = chat_template, tuple(end_ids)
        self._tokenizer = load_pipeline(pipeline)
        self._known = _size(self._tokenizer)
        self._encoder = PipelineEncoder(pipeline, self._tokenizer)
        self._encode = WordEncoder(self._encoder) if splits_at_white_space(pipeline) else self._encoder
        self.unk_id = self._encoder.unk_id
        self.mask_id, self.bos_id, self.eos_id, self.pad_id = specials.mask, specials.bos, specials.eos, specials.pad
        used = max(self._known, *(i + 1 for i in asdict(specials).values()))
        self.vocab_size, self._padded = max(used, vocab_size), vocab_size > used
        for id_ in end_ids:
            if not 0 <= id_ < self.vocab_size:
                raise ValueError(f"end token {id_} is not below the vocabulary's size {self.vocab_size}")

    @classmethod
    def open(cls, config: HuggingFaceConfig, *, padded: bool) -> Self | None:
        path = Path(config.path)
        if is_tokenizer_file(path):
            opened = open_tokenizer_file(path, cls.kind)
            assert isinstance(opened, cls)
            return opened
        return cls.from_files(path, padded=padded)

    @classmethod
    def build(cls, config: Any, *, symbols: Iterable[str], sample: Iterable[str], layout: GridLayout | None) -> Self:
        raise AssertionError("`open` returns a tokenizer for every configuration")

    @classmethod
    def from_files(
        cls, path: Path, *, padded: bool, model: ModelIds | None = None, named: str = "tokenizer.path"
    ) -> Self:
        """Read a `tokenizer.json`, or a folder with the files of a `transformers` tokenizer.

        Args:
            path: the file or the folder. A `tokenizer.json` is read with the settings in its folder.
            padded: whether the data set has padding. A tokenizer without a padding token then gets an id for it;
                otherwise its padding id is that of [EOS], which is never used.
            model: the tokenizer's model, if it has one.
            named: configuration key of `path`, for error messages.

        Raises:
            UserError: the files are missing or malformed.
        """
        folder = path.parent if path.is_file() else path
        has_settings = (
            path.is_dir() or path.name == PIPELINE_FILE
        )  # those beside a file of another name are not its own
        if has_settings:
            if any((folder / name).is_file() for name in _SETTINGS):
                path = folder
            elif (folder / PIPELINE_FILE).is_file():
                path = folder / PIPELINE_FILE  # `transformers` would need the model's configuration
        pipeline, roles = read_folder(path, named) if path.is_dir() else (_from_file(path, named), {})
        template = _chat_template(folder) if has_settings else None
        with reading(f"{named}={path}", "tokenizer"):
            library = load_pipeline(pipeline)
            specials = _special_ids(library, roles or _conventional(library), padded, model)
            rows, others = (0, ()) if model is None else (model.rows, model.ends)
            ends = _end_ids(folder, max(rows, _size(library))) if has_settings else ()
            added = library.get_added_tokens_decoder()  # some configurations name a token of text, by default
            ends = tuple(dict.fromkeys(id_ for id_ in (*ends, *others) if id_ in added and id_ != specials.eos))
            if specials.mask in ends:
                raise ValueError(f"the mask {specials.mask} is one of the model's end tokens (eos_token_id)")
            opened = cls(pipeline, specials, rows, template, ends)
            check_ids(opened)
        return opened

    @property
    def end_ids(self) -> tuple[int, ...]:
        after_answers = () if self._chat is None or isinstance(self._chat, str) else (self._chat.end_id,)
        return tuple(dict.fromkeys([self.eos_id, *after_answers, *self._end_ids]))

    @property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises UserError when there is none, or one that is not supported."""
        if self._chat is None:
            raise UserError(
                "the tokenizer has no chat template, or several of which none is named default; give a tokenizer whose "
                "folder has one"
            )
        if isinstance(self._chat, str):
            raise UserError(f"the chat template of the tokenizer is not supported: {self._chat}")
        return self._chat

    @cached_property
    def _chat(self) -> ChatTemplate | str | None:
        """The chat template; or the reason why it is not supported, which is no error unless it is needed."""
        if self.chat_template is None:
            return None
        added = {i: token for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        names = {role: name for role, id_ in roles.items() if (name := self._tokenizer.id_to_token(id_)) is not None}
        try:
            chat = ChatTemplate(self.chat_template, added, names, self.encode, self.mask_id)
            ids = chat.encode(PROBE).ids
            library = load_pipeline(self._pipeline)
            library.encode_special_tokens = False
            whole = library.encode(chat.render(PROBE, to_be_answered=False), add_special_tokens=False).ids
        except (ValueError, UnknownSymbol, UnusableChat) as error:
            return describe(error)
        return chat if whole[: len(ids)] == ids else "its parts have other ids than the conversation as a whole"

    def _ids_of(self, content: Content) -> list[int]:
        return self._encode(as_text(content))

    def decode(self, ids: Sequence[int]) -> str:
        text = [i for i in text_ids(ids, self) if i < self._known]
        with reading("the tokenizer.json of the model", "decoder of these ids"), panics_as_errors():
            return self._tokenizer.decode(text, skip_special_tokens=False)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        appended = {self.pad_id: "[PAD]", self.eos_id: "[EOS]", self.bos_id: "[BOS]", self.mask_id: "[MASK]"}
        return [self._tokenizer.id_to_token(int(i)) or appended.get(int(i), "") for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        content: dict[str, Any] = {"kind": self.kind, "specials": asdict(self._specials), "pipeline": self._pipeline}
        if self._padded:
            content["vocab_size"] = self.vocab_size
        if self.chat_template is not None:
            content["chat_template"] = self.chat_template
        if self._end_ids:
            content["end_ids"] = self._end_ids
        atomic_write_text(path, json.dumps(content, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def parse(cls, content: dict[str, Any], path: Path) -> Self:
        pipeline = content.get("pipeline")
        if not isinstance(pipeline, dict):
            raise ValueError("it has no `pipeline`, the content of a tokenizer.json")
        # Without the pipeline, which the library parses, because millions of values would take seconds.
        stored = parse_as(_HuggingFaceFile, {**content, "pipeline": {}}, path)
        return cls(pipeline, stored.specials, stored.vocab_size, stored.chat_template, stored.end_ids)

    @property
    def pipeline(self) -> Mapping[str, Any]:
        """Content of the `tokenizer.json` of the `tokenizers` library."""
        return self._pipeline

    @property
    def names_mask(self) -> bool:
        """Return whether the mask is a token of the pipeline, rather than one that was appended."""
        return self._tokenizer.id_to_token(self.mask_id) is not None

    def write_transformers_files(self, to: Path, length: int) -> None:
        """Write files into the folder `to` from which `AutoTokenizer` loads this tokenizer."""
        write_folder(to, self._pipeline, asdict(self._specials), self.chat_template, length)


def open_model_tokenizer(path: Path, model: ModelIds) -> Tokenizer:
    """Open the tokenizer of a published model.

    `path` is a `tokenizer.json` or the folder of a Hugging Face tokenizer, a .model file, or a tokenizer file of scmdm.
    Raises UserError when the file is missing or malformed, or has another mask or [BOS] than the model.
    """
    if path.suffix != ".model" and not is_tokenizer_file(path):
        return HuggingFaceTokenizer.from_files(path, padded=False, model=model, named="tokenizer")
    saved = load_tokenizer(path)
    mask = model.stated_mask if model.mask is None else model.mask
    for role, wanted, found in (("mask", mask, saved.mask_id), ("BOS", model.bos, saved.bos_id)):
        if wanted is not None and wanted != found:
            raise UserError(f"tokenizer={path} has the {role} id {found}, the model {wanted}; give its tokenizer")
    return saved


def _chat_template(folder: Path) -> str | None:
    """Read the chat template in the folder of a `transformers` tokenizer."""
    path = folder / _CHAT_FILE
    if path.is_file():
        with reading(path, "chat template"):
            return read_bytes(path, LARGEST_TEMPLATE).decode()
    path = folder / _SETTINGS[0]
    if not path.is_file():
        return None
    settings = read_json(path, "settings of a tokenizer")
    with reading(path, "settings of a tokenizer"):
        found = settings.get("chat_template") if isinstance(settings, dict) else None
        if isinstance(found, list):  # several, each with a name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if found is not None and not isinstance(found, str):
            raise ValueError(f"chat_template is {type(found).__name__}, not text")
    return found


def token_ids(value: Any, rows: int | None = None) -> tuple[int, ...]:
    """Return the ids in a field such as `eos_token_id`: several in a list, one, or none (null, or -1 in older files).

    Raises ValueError for what is not an id of one of the `rows` tokens of the vocabulary.
    """
    found = value if isinstance(value, list) else [value]
    ids = tuple(id_ for id_ in found if id_ is not None and id_ != -1)
    for id_ in ids:
        if type(id_) is not int or not 0 <= id_ < (rows or math.inf):
            raise ValueError(f"{shorten(id_)} is no token id{f' from 0 to {rows - 1}' if rows else ''}")
    return ids


def _end_ids(folder: Path, rows: int) -> tuple[int, ...]:
    """Read the ids of all end tokens from the model's settings of generation, if they are in the folder.

    Ids beyond the vocabulary, such as the default of a class for another tokenizer, are left out with a warning.
    """
    path = folder / _GENERATION_FILE
    if not path.is_file():
        return ()
    settings = read_json(path, "settings of generation")
    with reading(path, "settings of generation"):
        if not isinstance(settings, dict):
            raise ValueError("the file as a whole is not a JSON object")
    try:
        found = token_ids(settings.get("eos_token_id"))
    except ValueError as error:
        raise UserError(
            f"{path}: eos_token_id={shorten(settings['eos_token_id'])}: {error}; remove it, or give the tokenizer of "
            "the same model"
        ) from error
    for id_ in found:
        if id_ >= rows:
            logger.warning("%s: eos_token_id=%d is not among the %d tokens and is left out", path, id_, rows)
    return tuple(id_ for id_ in found if id_ < rows)


def _size(tokenizer: tokenizers.Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _conventional(tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """Return the names of specials by role, for a tokenizer whose files do not assign roles."""
    found = {
        role: next((n for n in names if tokenizer.token_to_id(n) is not None), None) for role, names in _NAMES.items()
    }
    return {role: name for role, name in found.items() if name is not None}


def _special_ids(
    tokenizer: tokenizers.Tokenizer, names: Mapping[str, str], padded: bool, model: ModelIds | None
) -> SpecialIds:
    """Return the ids of the named specials, and ids after the vocabulary for the others.

    A model has no trained embedding of appended ids: without a [BOS] of its own it gets `default_bos` or [EOS].
    """
    named = {role: tokenizer.token_to_id(name) for role, name in names.items()}
    ids = {role: id_ for role, id_ in named.items() if id_ is not None}
    # Many tokenizers without a mask or padding token name another special for it.
    ids = {r: i for r, i in ids.items() if r not in ("mask", "pad") or i not in (ids.get("bos"), ids.get("eos"))}
    if model is not None:
        mask = _agreed_mask(model, ids.get("mask"), names.get("mask"))
        ids |= {role: id_ for role, id_ in (("mask", mask), ("bos", model.bos)) if id_ is not None}
        if "bos" not in ids and (substitute := _substitute(tokenizer, ids, model)) is not None:
            ids["bos"] = substitute
        if "eos" not in ids and "bos" in ids:
            ids["eos"] = ids["bos"]
    end = _size(tokenizer)
    for role in _NAMES:
        if role not in ids:
            appended = role != "pad" or padded
            ids[role] = end if appended else ids["eos"]
            end += appended
    return SpecialIds(**ids)


def _agreed_mask(model: ModelIds, named: int | None, name: str | None) -> int | None:
    """Return the id of the mask that the model gives. Raises UserError when configuration and tokenizer differ."""
    if model.mask is None and model.stated_mask is not None and named not in (None, model.stated_mask):
        raise UserError(
            f"the configuration of the model has mask_token_id={model.stated_mask}, but the mask of its tokenizer is "
            f"{name!r} (id {named}); give mask_id=NUMBER, the one that the model was trained with"
        )
    return model.stated_mask if model.mask is None else model.mask


def _substitute(tokenizer: tokenizers.Tokenizer, ids: Mapping[str, int], model: ModelIds) -> int | None:
    special = tokenizer.get_added_tokens_decoder().get(model.default_bos)
    return model.default_bos if special is not None and special.special else ids.get("eos")


def _from_file(path: Path, named: str) -> dict[str, Any]:
    try:
        content = read_json(path, "tokenizer.json", remedy="give another file")
    except FileNotFoundError as error:
        raise UserError(
            f"{named}={path} does not exist; give a tokenizer.json, or the folder of a transformers tokenizer"
        ) from error
    with reading(f"{named}={path}", "tokenizer.json", "give another file"):
        if not isinstance(content, dict):
            raise ValueError("the file as a whole is not a JSON object")
        require_stated_ids(content, load_pipeline(content), f"{named}={path}")
    return content
