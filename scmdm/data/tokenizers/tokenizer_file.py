"""Read tokenizer files that `Tokenizer.save` has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scmdm.config.preparation import TOKENIZERS
from scmdm.data.tokenizers.base import Tokenizer
from scmdm.errors import UserError


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer file. Raises UserError when it is missing or damaged."""
    try:
        if path.suffix == ".model":
            sentencepiece: Tokenizer = TOKENIZERS.load("sentencepiece")(path.read_bytes())
            return sentencepiece
        content: dict[str, Any] = json.loads(path.read_text())
        kind = content["kind"]
        if kind not in TOKENIZERS.names:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(TOKENIZERS.names)}")
        tokenizer: Tokenizer = TOKENIZERS.load(kind).parse(content)
        return tokenizer
    except FileNotFoundError as error:
        raise UserError(f"tokenizer {path} is missing; prepare the data set again, or restore the directory") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise UserError(
            f"tokenizer {path} is damaged ({error}); prepare the data set again, or restore the directory"
        ) from error


def is_tokenizer_file(path: Path) -> bool:
    """Return whether a file is JSON that `Tokenizer.save` has written."""
    try:
        return path.is_file() and isinstance(json.loads(path.read_text()).get("kind"), str)
    except (OSError, ValueError, AttributeError):
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
