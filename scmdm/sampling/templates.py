"""Templates, the initial tokens of samples, made from a prompt, a file of prompts or a text to fill in.

Legend: L length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_prep.corpus_files import kind_of, require_kind
from data_prep.text_files import read_text_lines
from data_prep.text_formats import FORMATS, Format, RowKeys
from scmdm.config.fields import shorten
from scmdm.data.preparation.records import Slice
from scmdm.data.tokenizers import Tokenizer, UnknownSymbol
from scmdm.data.tokenizers.chat_template import USER, Turn, UnusableChat, turns_of
from scmdm.errors import UserError
from scmdm.models.model_files import LoadedModel
from scmdm.system.untrusted import LARGEST_TEXT, reading, require_regular

MASK_TEXT = "[MASK]"
Prompt = str | Sequence[Turn]  # text, or a conversation that ends with a question
_PROMPT_FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")


def make_template(
    tokenizer: Tokenizer,
    length: int,
    prompt: Prompt | None,
    infill: str | None,
    *,
    bos_given: bool,
    add_bos: bool = True,
    gen_length: int | None = None,
    padding_id: int | None = None,
) -> Tensor:
    """Make a template (L,) int64 of a prompt, or of a text with `[MASK]` in it, and the mask id everywhere else.

    With `bos_given`, [BOS] is set even without a prompt; without `add_bos`, it never is. A conversation begins as the
    chat template says. With `gen_length`, the template has that number of masks after the prompt, otherwise `length`
    tokens. `padding_id`, that of the model's data set (None: [PAD]), follows a text that is filled in. Raises UserError
    for a text that the vocabulary cannot encode or that is longer than `length`.
    """
    if prompt is not None and not isinstance(prompt, str):
        add_bos = False
    given = [tokenizer.bos_id] if add_bos and (bos_given or prompt is not None or infill is not None) else []
    if infill is not None:
        pieces = infill.split(MASK_TEXT)
        given += _encode(tokenizer, pieces[0], "infill")
        for piece in pieces[1:]:
            given += [tokenizer.mask_id, *_encode(tokenizer, piece, "infill")]
        given.append(tokenizer.eos_id)
    elif prompt is not None:
        given += _encode(tokenizer, prompt, "prompt") if isinstance(prompt, str) else _encode_chat(tokenizer, prompt)
    if gen_length is not None:
        length = len(given) + gen_length
    name, ends = ("prompt", "[BOS]") if infill is None else ("infill", "[BOS] and [EOS]")
    if len(given) > length:
        raise UserError(
            f"{name} has {len(given)} tokens with {ends}, but the samples have {length}; shorten it, or set length"
        )
    if infill is not None and tokenizer.mask_id not in given:
        raise UserError(f"infill={shorten(infill)} has no {MASK_TEXT}; write one in place of each token to fill in")
    if infill is None and len(given) == length:
        raise UserError(
            f"prompt has {len(given)} tokens with {ends}, which leaves none of {length} to generate; shorten it, or "
            "set length"
        )
    padding = tokenizer.pad_id if padding_id is None else padding_id
    row = torch.full((length,), tokenizer.mask_id if infill is None else padding)
    row[: len(given)] = torch.tensor(given, dtype=torch.int64)
    return row


def make_model_template(
    loaded: LoadedModel,
    length: int,
    prompt: Prompt | None = None,
    infill: str | None = None,
    *,
    add_bos: bool = True,
    gen_length: int | None = None,
) -> Tensor:
    """Call `make_template` with a model's tokenizer, and `bos_policy` and padding of its data set.

    To a model of conversations, a prompt is a question.
    """
    if isinstance(prompt, str) and loaded.manifest.framing == "chats":
        prompt = question(prompt)
    return make_template(
        loaded.tokenizer,
        length,
        prompt,
        infill,
        bos_given=loaded.manifest.bos_policy == "given",
        add_bos=add_bos,
        gen_length=gen_length,
        padding_id=loaded.manifest.padding_id,
    )


def pad_templates(templates: Sequence[Tensor], padding_id: int) -> tuple[Tensor, Tensor]:
    """Stack templates (L,) of different lengths: return them padded at the end (P, L), and their lengths (P,)."""
    padded_PL = pad_sequence(list(templates), batch_first=True, padding_value=padding_id)
    return padded_PL, torch.tensor([len(template) for template in templates])


def require_prompt(loaded: LoadedModel, given: Prompt | None) -> None:
    """Raise UserError when a model of responses to prompts is given no prompt."""
    if given is None and loaded.manifest.has_prompts:
        raise UserError(
            f"{loaded.path} was trained to answer prompts and cannot generate one; give prompt=TEXT, prompts=FILE, "
            "messages=FILE or infill=TEXT"
        )


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line that is not blank, or the key (column) `prompt` of each row of `.jsonl`, CSV or parquet.

    Raises UserError for a file that cannot be read and for a row without a prompt: to skip it would shift the samples
    of those that follow.
    """
    with reading(path, "file of prompts", "give a text file with one prompt per line"):
        require_regular(path)
    name = f"prompts={path}"
    kind = require_kind(path, _PROMPT_FORMATS) if path.suffix else kind_of("prompts.txt")
    if kind.format == "text":
        prompts = [line for line in read_text_lines(path, name, LARGEST_TEXT) if line.strip()]
    else:
        prompts = list(_prompts_of_rows(path, FORMATS[kind.format or ""]))
    if not prompts:
        raise UserError(f"{name} holds no prompt; give one prompt per line")
    return prompts


def question(text: str) -> Sequence[Turn]:
    """Return a conversation that begins with a question."""
    return (Turn(USER, text),)


def read_messages(path: Path) -> list[Sequence[Turn]]:
    """Read the conversation in the key (column) `messages` of each row of `.jsonl` or parquet, in OpenAI's form.

    Raises UserError for a file that cannot be read and for a row without a conversation that ends with a question.
    """
    with reading(path, "file of messages"):
        require_regular(path)
    kind = require_kind(path, ("jsonl", "json", "parquet"))
    keys = RowKeys(messages="messages", last_role=USER)
    found: list[Sequence[Turn]] = []
    for document in FORMATS[kind.format or ""].read(path, Slice(path.name), keys):
        if document.messages is None:
            raise UserError(f"messages={path}: {document.problem}: {document.where}; each row needs the key messages")
        found.append(turns_of(document.messages))
    if not found:
        raise UserError(f"messages={path} holds no conversation; give one per line")
    return found


def _prompts_of_rows(path: Path, known: Format) -> Iterator[str]:
    size = 0
    for document in known.read(path, Slice(path.name), RowKeys("prompt", offers_chats=False)):
        if document.text is None:
            raise UserError(
                f"prompts={path}: {document.problem}: {document.where}; each row needs the key prompt with a text"
            )
        if not document.text.strip():
            raise UserError(f"prompts={path}: blank prompt: {document.where}; each row needs a prompt")
        size += len(document.text)
        if size > LARGEST_TEXT:
            raise UserError(f"prompts={path} has more than {LARGEST_TEXT} characters; give a smaller file")
        yield document.text


def _encode(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    try:
        return tokenizer.encode(text) if text else []
    except UnknownSymbol as error:
        raise UserError(f"{name}={text!r} cannot be encoded with the model's vocabulary: {error}") from error


def _encode_chat(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    try:
        return tokenizer.chat.encode_prompt(turns)
    except (UnknownSymbol, UnusableChat) as error:
        raise UserError(f"conversation {turns[-1].content[:60]!r}: {error}") from error
