"""Checked reading of a published model's untrusted configuration and shapes.

A configuration is read by an allow-list: each field is read, or is known to be harmless, or is refused by name. A field
that is unknown may change what the network computes, and a model that computes something else looks like a bad one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from scmdm.config.fields import Key, shorten
from scmdm.config.model import ModelConfig
from scmdm.convert.published_files import PublishedFiles
from scmdm.errors import UserError

Model = TypeVar("Model", bound=ModelConfig)
Allowed = tuple[Any, ...] | None  # values of a field with which it changes nothing; None: any value


def any_value(*names: str) -> dict[str, Allowed]:
    """Declare fields that change nothing, whatever their value."""
    return dict.fromkeys(names)


# Fields of every configuration that `transformers` 4 and 5 write: generation, training, labels, bookkeeping.
TRANSFORMERS_FIELDS: dict[str, Allowed] = {
    **any_value("_name_or_path", "architectures", "auto_map", "model_type", "name_or_path", "transformers_version"),
    **any_value("dtype", "torch_dtype", "torchscript", "use_bfloat16", "use_cache", "vocab_size"),
    **any_value("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "attn_implementation"),
    **any_value("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    **any_value("mask_token_id", "tokenizer_class", "prefix", "is_decoder", "chunk_size_feed_forward"),
    **any_value("output_attentions", "output_hidden_states", "output_scores", "return_dict", "use_return_dict"),
    **any_value("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
    **any_value("initializer_range", "tf_legacy_loss", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
    **any_value("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    **any_value("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    **any_value("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    **any_value("num_return_sequences", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    **any_value("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    **any_value("begin_suppress_tokens"),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
}


class PublishedConfig:
    """Values of a published configuration; each method raises UserError that names the field and the value found.

    Args:
        source: the model, for messages and shapes.
        content: the fields; None: those of `source.config`.
        section: section of the configuration that they are from, for messages.
    """

    def __init__(self, source: PublishedFiles, content: Mapping[str, Any] | None = None, section: str = "") -> None:
        self._path, self._section = source.path, f"{section}." if section else ""
        self._content = source.config if content is None else content
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """Return a field that the caller checks; None if it is absent."""
        self._read.add(key)
        return self._content.get(key)

    def has(self, key: str) -> bool:
        """Return whether a field is there and not null."""
        return self.get(key) is not None

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        """Read a number within bounds; an absent key or null gives `default`. The key is mandatory without default."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.refusal(key, value, f"expected a number from {low} to {high}")
        return value

    def integer(self, key: str, default: int | None = None, high: int = 2**31) -> int:
        """Read a positive integer up to `high`; see `number`."""
        value = self.number(key, default, 1, high)
        if value != int(value):
            raise self.refusal(key, value, f"expected an integer from 1 to {high}")
        return int(value)

    def value(self, key: str, kind: type, rules: Key) -> Any:
        """Read a field that a key with these rules takes over. It is mandatory."""
        value = self.get(key)
        if kind is bool:
            return self.flag(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not rules.allows(value) or (kind is int and value != int(value)):
            raise self.refusal(key, value, f"expected {'an integer' if kind is int else 'a number'} {rules.wanted()}")
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Read a boolean; an absent key or null gives `default`."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refusal(key, value, "expected true or false")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """Return a field that holds other fields; empty if it is absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.refusal(key, value, "expected a mapping of fields")
        return value or {}

    def expect(self, key: str, *possible: object, absent: object = None) -> None:
        """Refuse a value that selects a computation that scmdm does not implement.

        `absent` is the value that an absent key means in the original code; None: a possible one.
        """
        value = self.get(key)
        value = absent if value is None else value
        if value is not None and not any(_same(value, other) for other in possible):
            names = ", ".join(map(shorten, possible))
            raise self.refusal(key, value, f"scmdm implements only {names}")

    def match_weights(self, key: str, found: int, of_what: str) -> None:
        """Refuse a size that is not the one found in the weights; an absent key or null states none."""
        value = self.get(key)
        if value is not None and not _same(value, found):
            reason = f"the weights have {found} {of_what}; the files are of two models, download them again"
            raise self.refusal(key, value, reason)

    def refuse_unknown(self, harmless: Mapping[str, Allowed]) -> None:
        """Refuse fields that were not read, unless `harmless` lists them with their value. Null is an absent field."""
        for key, value in self._content.items():
            if value is None or key in self._read:
                continue
            if key not in harmless:
                raise self.refusal(
                    key,
                    value,
                    "scmdm does not know this field, which may change what the network computes; import another "
                    f"model, or give ignore=[{self._section}{key}] if it has no influence on the logits",
                )
            allowed = harmless[key]
            if allowed is not None and not any(_same(value, other) for other in allowed):
                names = ", ".join(map(shorten, allowed)) or "null"
                raise self.refusal(key, value, f"scmdm implements only {names}")

    def refusal(self, key: str, value: object, reason: str) -> UserError:
        """Return the error for a value."""
        return UserError(f"{self._path}: {self._section}{key}={shorten(value)} in its configuration; {reason}")


def _same(one: object, other: object) -> bool:
    """Compare without taking 1 for true."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def count_blocks(source: PublishedFiles, pattern: str) -> int:
    """Count the blocks by the names of tensors. Raises UserError unless they are numbered 0, 1, 2, ..."""
    numbers = {int(found[1]) for name in source.tensors.shapes() if (found := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise UserError(
            f"{source.path} has no blocks numbered 0, 1, 2, ... ({pattern}); the file is incomplete or not a model"
        )
    return len(numbers)


def check_rows(config: PublishedConfig, rows: int, *names: str) -> None:
    """Refuse a size of the vocabulary that is not the number of rows of the embedding.

    The last of the fields `names` that is there states it; the original code makes the embedding of that size.
    """
    for name in [name for name in names if config.has(name)][-1:]:
        config.match_weights(name, rows, "rows of the embedding")


def matrix_shape(source: PublishedFiles, name: str) -> torch.Size:
    """Return the shape of a published matrix. Raises UserError when it is missing, empty or not a matrix."""
    shape = source.tensors.shapes().get(name)
    if shape is None or len(shape) != 2 or 0 in shape:
        found = "is missing" if shape is None else f"has shape {tuple(shape)}, expected a matrix"
        raise UserError(f"{source.path}: {name} {found}; download the model again")
    return shape


def validated(model: Model, source: PublishedFiles) -> Model:
    """Return a model whose keys fit together. Raises UserError, which names the source."""
    try:
        model.validate()
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from error
    return model
