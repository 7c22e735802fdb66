"""Causal language models of `transformers` that score text, checked before anything is sampled for them.

A scorer is a folder of files from strangers: nothing in it is run, nothing is downloaded, and memory is bounded by the
size of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from scmdm.errors import UserError
from scmdm.models.safetensors_headers import StoredTensor, published_tensors, require_finite_all
from scmdm.system.untrusted import read_json, reading

SCORER_LENGTH = 1024  # tokens of a text that the scorer reads, as in MDLM
_WANTED = "give the local directory of a causal transformers model with safetensors weights and its tokenizer"
_SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_LARGEST_CONFIG = 2**24  # bytes
_COUNTED = re.compile("layer|expert|block", re.IGNORECASE)
_MOST_COUNTED = 100_000  # layers or experts: transformers makes lists of this length
_MODULES, _SPARE = 4, 500  # modules of a model for each of its tensors, and beyond them
_MOST_BUFFERS = 2**31  # numbers that a model computes for itself, such as causal masks
_PROBE, _KEPT = 16, 4  # tokens of the probe, and how many of them stay when the others change
_ROUNDING = 1e-5  # relative difference of equal rows of a batch


@dataclass(frozen=True)
class CausalScorer:
    """A causal model and its tokenizer."""

    path: Path
    model: Any
    tokenizer: Any

    @property
    def length(self) -> int:
        """Number of tokens of a text that are scored: `SCORER_LENGTH` or, if fewer, the model's positions."""
        return min(SCORER_LENGTH, _positions(self.model.config))


def check_scorer(scorer: Path) -> dict[str, Any]:
    """Return the configuration of a scorer's folder.

    Raises UserError unless it is the folder of a transformers model that needs neither code of its own, nor
    quantization, nor another model.
    """
    try:
        config = _settings(scorer, "config.json")
    except FileNotFoundError as error:
        raise UserError(
            f"metrics.scorer={scorer} is not the directory of a transformers model (no config.json); {_WANTED}"
        ) from error
    for name in _SETTINGS:
        if (scorer / name).exists() and "auto_map" in _settings(scorer, name):
            raise UserError(
                f"metrics.scorer={scorer}: auto_map in {name} asks for code of its own, which is never run; {_WANTED}"
            )
    if (scorer / "adapter_config.json").exists():
        raise UserError(f"metrics.scorer={scorer} holds an adapter of another model; merge it first, and {_WANTED}")
    if config.get("quantization_config") is not None:
        raise UserError(f"metrics.scorer={scorer}: quantization_config in config.json is not supported; {_WANTED}")
    for name, value in _integers(config):
        if _COUNTED.search(name) and value > _MOST_COUNTED:
            raise UserError(f"metrics.scorer={scorer}: {name}={value} in config.json; expected at most {_MOST_COUNTED}")
    return config


def _settings(scorer: Path, name: str) -> dict[str, Any]:
    content = read_json(scorer / name, limit=_LARGEST_CONFIG, remedy=_WANTED)
    if not isinstance(content, dict):
        raise UserError(f"{scorer / name} is not a JSON object; {_WANTED}")
    return content


def _integers(content: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _integers(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _integers(value, name)
    elif isinstance(content, int):
        yield name, content


def load_scorer(scorer: Path) -> CausalScorer:
    """Load a causal model and its tokenizer from a local directory, onto the CPU.

    Raises UserError, which names what is wrong and what is allowed, unless the weights are complete and finite, each
    id of the tokenizer has an embedding, and no prediction depends on later tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model: Any
    found: Any
    check_scorer(scorer)
    stored = published_tensors(scorer)
    local = {"local_files_only": True, "trust_remote_code": False}
    with reading(f"metrics.scorer={scorer}", "causal model with its tokenizer", _WANTED):
        config = AutoConfig.from_pretrained(scorer, **local)
        _require_causal_kind(scorer, config)
        _check_sizes(scorer, config, stored)
    with reading(scorer, "folder of a tokenizer (tokenizer.json)", _WANTED):
        tokenizer = AutoTokenizer.from_pretrained(scorer, **local)
    with reading(f"metrics.scorer={scorer}", "causal model", _WANTED):
        model, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            scorer, config=config, use_safetensors=True, output_loading_info=True, **local
        )
        model.eval()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            first = sorted(map(str, found[kind]))[0]
            raise UserError(f"metrics.scorer={scorer}: {kind.replace('_keys', '')} tensor {first}; {_WANTED}")
    require_finite_all(model.named_parameters(), f"metrics.scorer={scorer}")
    _check_ids(scorer, model, tokenizer)
    with reading(f"metrics.scorer={scorer}", "causal model", _WANTED):
        _check_causal(scorer, model)
    return CausalScorer(scorer, model, tokenizer)


def require_end_of_text(scorer: CausalScorer) -> None:
    """Raise UserError unless the scorer's tokenizer has an end of text, and reads its name as that one token."""
    name, id_ = scorer.tokenizer.eos_token, scorer.tokenizer.eos_token_id
    if name is None or scorer.tokenizer(name)["input_ids"] != [id_]:
        raise UserError(
            f"metrics.protocol=mdlm is not possible with metrics.scorer={scorer.path}, whose tokenizer has no end of "
            "text (eos_token) or adds tokens of its own; give gpt2-large, or leave metrics.protocol out"
        )


def _require_causal_kind(scorer: Path, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    name = f"metrics.scorer={scorer}: model_type={config.model_type}"
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name} is not a causal language model; {_WANTED}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder:
        raise UserError(f"{name} sees later tokens, so that it has no perplexity; {_WANTED}")


def _check_sizes(scorer: Path, config: Any, stored: dict[str, StoredTensor]) -> None:
    """Raise UserError unless the model that the configuration describes is about as large as its weights."""
    from transformers import AutoModelForCausalLM

    with _bounded_construction(_MODULES * len(stored) + _SPARE), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    parameters = dict(empty.named_parameters())
    described, have = sum(p.numel() for p in parameters.values()), sum(t.shape.numel() for t in stored.values())
    if described > have:
        raise UserError(
            f"metrics.scorer={scorer}: config.json describes {described} parameters, the files hold {have}; {_WANTED}"
        )
    if sum(buffer.numel() for buffer in empty.buffers()) > _MOST_BUFFERS or _positions(config) < 2:
        raise UserError(f"metrics.scorer={scorer}: {_positions(config)} positions in config.json; {_WANTED}")
    for name, tensor in stored.items():
        if name in parameters or f"{empty.base_model_prefix}.{name}" in parameters:
            _ = tensor.dtype  # refuses what is not floating-point


@contextmanager
def _bounded_construction(most: int) -> Iterator[None]:
    """Stop a model that is being made, with a ValueError, when it has more than `most` modules."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(f"its configuration describes more than {most} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _positions(config: Any) -> int:
    """Return the largest number of positions that a configuration states; `SCORER_LENGTH` if it states none."""
    known = getattr(config, "max_position_embeddings", None)
    return known if isinstance(known, int) else SCORER_LENGTH


def _check_ids(scorer: Path, model: nn.Module, tokenizer: Any) -> None:
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    largest = max([len(tokenizer) - 1, *tokenizer.get_vocab().values()])
    if largest >= rows:
        raise UserError(
            f"metrics.scorer={scorer}: its tokenizer has ids up to {largest}, its embedding {rows} rows; give the "
            "tokenizer that the model was trained with"
        )


@torch.no_grad()
def _check_causal(scorer: Path, model: Any) -> None:
    """Raise UserError if the first predictions change when later tokens do, by more than equal rows differ."""
    rows = len(model.get_input_embeddings().weight)
    length = min(_PROBE, _positions(model.config))
    kept = min(_KEPT, length - 1)
    first_L = torch.arange(length) * 7 % rows
    changed_L = torch.where(torch.arange(length) < kept, first_L, (first_L + 1) % rows)
    ids_NL = torch.stack([first_L, changed_L, first_L])
    logits_NLV = model(input_ids=ids_NL, attention_mask=torch.ones_like(ids_NL)).logits.float()
    if logits_NLV.shape != (*ids_NL.shape, logits_NLV.shape[-1]) or not bool(logits_NLV.isfinite().all()):
        raise UserError(f"metrics.scorer={scorer} has no finite predictions for each token; {_WANTED}")
    first, changed, again = logits_NLV[:, :kept]
    rounding = max(_ROUNDING * float(logits_NLV.abs().max()), 10 * float((first - again).abs().max()))
    if float((first - changed).abs().max()) > rounding:
        raise UserError(f"metrics.scorer={scorer} is not causal: its predictions depend on later tokens; {_WANTED}")
