"""Read tokenizer files that `Tokenizer.save` has written."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from scmdm.config.preparation import TOKENIZERS
from scmdm.data.tokenizers.base import Tokenizer, check_ids
from scmdm.errors import UserError
from scmdm.system.untrusted import read_bytes, read_json, reading

_REMEDY = "prepare the data set again, or restore the directory"


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer file. Raises UserError when it is missing or damaged."""
    try:
        with reading(path, "tokenizer", _REMEDY):
            tokenizer = _load_sentencepiece(path) if path.suffix == ".model" else _parse(path)
            check_ids(tokenizer)
            return tokenizer
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"tokenizer {path} is missing; {_REMEDY}") from error
        raise


def _load_sentencepiece(path: Path) -> Tokenizer:
    loaded: Tokenizer = TOKENIZERS.load("sentencepiece")(read_bytes(path))
    return loaded


def _parse(path: Path) -> Tokenizer:
    content = read_json(path, "tokenizer", remedy=_REMEDY)
    if not _is_ours(content):
        raise ValueError("it has no `kind`")
    if content["kind"] not in TOKENIZERS.names:
        raise ValueError(f"kind={content['kind'][:60]!r} is not one of {', '.join(TOKENIZERS.names)}")
    parsed: Tokenizer = TOKENIZERS.load(content["kind"]).parse(content, path)
    return parsed


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("kind"), str)


def is_tokenizer_file(path: Path) -> bool:
    """Return whether a file is JSON that `Tokenizer.save` has written."""
    with suppress(OSError, UserError, ValueError, RecursionError):  # a strict reader follows and says what is wrong
        return _is_ours(json.loads(read_bytes(path)))
    return False


def open_tokenizer_file(path: Path, kind: str) -> Tokenizer:
    """Open the file that the key `tokenizer.path` names. Raises UserError when it is damaged or of another kind."""
    if not is_tokenizer_file(path):
        raise UserError(
            f"tokenizer.path={path} is not a tokenizer file of scmdm; give the tokenizer.json of a model or a data set"
        )
    saved = load_tokenizer(path)
    if saved.kind != kind:
        raise UserError(
            f"tokenizer.path={path} is a tokenizer of kind {saved.kind}; set tokenizer.name={saved.kind}, or give "
            "another path"
        )
    return saved
