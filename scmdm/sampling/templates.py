"""Templates, the initial tokens of samples, made from a prompt, a file of prompts or a text to fill in.

Legend: L length.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from scmdm.data.tokenizers import Tokenizer, UnknownSymbol
from scmdm.errors import UserError
from scmdm.models.model_files import LoadedModel

MASK_TEXT = "[MASK]"


def make_template(
    tokenizer: Tokenizer, length: int, prompt: str | None, infill: str | None, *, bos_given: bool
) -> Tensor:
    """Make a template (L,) int64 of a prompt, or of a text with `[MASK]` in it, and the mask id everywhere else.

    With `bos_given`, [BOS] is set even without a prompt. Raises UserError for a text that the vocabulary cannot encode
    or that is longer than `length`.
    """
    row = torch.full((length,), tokenizer.mask_id)
    if infill is not None:
        pieces = infill.split(MASK_TEXT)
        given = [tokenizer.bos_id, *_encode(tokenizer, pieces[0], "infill")]
        for piece in pieces[1:]:
            given += [tokenizer.mask_id, *_encode(tokenizer, piece, "infill")]
        row[:] = tokenizer.pad_id
        given.append(tokenizer.eos_id)
    elif prompt is not None or bos_given:
        given = [tokenizer.bos_id, *_encode(tokenizer, prompt or "", "prompt")]
    else:
        return row
    if len(given) > length:
        name = "prompt" if infill is None else "infill"
        raise UserError(
            f"{name} has {len(given)} tokens with [BOS] and [EOS], but the samples have {length}; shorten it, or set "
            "length"
        )
    row[: len(given)] = torch.tensor(given)
    return row


def make_model_template(
    loaded: LoadedModel, length: int, prompt: str | None = None, infill: str | None = None
) -> Tensor:
    """Call `make_template` with a model's tokenizer and its data set's `bos_policy`."""
    bos_given = loaded.manifest.bos_policy == "given"
    return make_template(loaded.tokenizer, length, prompt, infill, bos_given=bos_given)


def require_prompt(loaded: LoadedModel, given: str | None) -> None:
    """Raise UserError when a model of responses to prompts is given no prompt."""
    if given is None and loaded.manifest.framing == "prompts":
        raise UserError(
            f"{loaded.path} was trained to answer prompts and cannot generate one; give prompt=TEXT, prompts=FILE or "
            "infill=TEXT"
        )


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line, or in `.jsonl` one object with the key `prompt` per line.

    Raises UserError for a file that cannot be read, for a line without a prompt, and for an empty file.
    """
    try:
        lines = path.read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts={path} cannot be read ({error}); give a text file with one prompt per line"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f'prompts={path}: not every line is {{"prompt": TEXT}} ({error!r})') from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"prompts={path} holds no prompt, or one that is not a string; give one prompt per line")
    return prompts


def _encode(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    try:
        return tokenizer.encode(text) if text else []
    except UnknownSymbol as error:
        raise UserError(f"{name}={text!r} cannot be encoded with the model's vocabulary: {error}") from error
