"""`scmdm import`: convert a published model into a model directory, which all other commands read.

Names and shapes are compared with the architecture that the configuration describes before anything is allocated.
Weights are copied one file at a time, in their own dtype.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmdm.checkpoint.seal import seal
from scmdm.config.conversion import ImportConfig
from scmdm.config.fields import shorten, validate_keys
from scmdm.config.model import DENOISERS
from scmdm.convert.layout import EMBEDDING, HEAD, HEAD_BIAS, PublishedLayout, find_layout
from scmdm.convert.other_networks import refuse_other_networks
from scmdm.convert.published_blocks import read_block_length
from scmdm.convert.published_config import PublishedConfig, matrix_shape
from scmdm.convert.published_files import PublishedFiles, open_source
from scmdm.convert.regrouped_tensors import regrouped
from scmdm.convert.upcycling import upcycled_model, upcycled_weights
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.shard_writer import Description, make_manifest
from scmdm.data.tokenizers import ModelIds, Tokenizer, open_model_tokenizer, token_ids
from scmdm.errors import UserError
from scmdm.models.conditioner import CONDITIONER_PREFIX
from scmdm.models.model_files import (
    LONGEST,
    MODEL_FILE,
    WEIGHTS_FILE,
    ModelSpec,
    check_fit,
    open_model,
    tokenizer_file,
    validate_spec,
    write_model_files,
)
from scmdm.models.network import count_parameters
from scmdm.models.safetensors_headers import SINGLE_FILE
from scmdm.models.safetensors_shards import write_shards
from scmdm.system.files import atomic_directory
from scmdm.system.untrusted import reading

SUBDIRECTORY, CONDITIONER_FILE = "scmdm", f"conditioner{Path(SINGLE_FILE).suffix}"
_SHARD = 2 * 10**9  # bytes of a weights file, and about the memory in use
_HALF_PRECISION = 1e-2  # relative error of a number in bfloat16, rounded up


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    layout: str
    spec: ModelSpec
    parameters: int
    notes: tuple[str, ...]  # assumptions about properties that the files do not state


@dataclass(frozen=True)
class _ImportPlan:
    """Content of the files to write."""

    spec: ModelSpec
    manifest: Manifest
    tokenizer_file: Path
    conditioner: PublishedFiles | None
    mask_row: bool  # add a row for the mask to embedding and head
    notes: tuple[str, ...]


def import_model(path: Path, out: Path, config: ImportConfig, *, shard_bytes: int = _SHARD) -> Imported:
    """Convert the model at `path` (directory, safetensors file or Lightning checkpoint) into the new directory `out`.

    A directory that `scmdm export` wrote is restored with its conditioner. Raises UserError when files are damaged or
    hostile, or when scmdm does not implement the architecture.
    """
    if out.exists():
        raise UserError(f"{out} exists; import into a new directory, or remove it first")
    if (path / MODEL_FILE).is_file():
        raise UserError(f"{path} is a model of scmdm already ({MODEL_FILE}); give it to the other commands as it is")
    _refuse_without_effect(path, config)
    source = open_source(path, config.weights)
    refuse_other_networks(source)
    layout = find_layout(source, config.format)
    with tempfile.TemporaryDirectory() as scratch, atomic_directory(out) as temporary:
        is_export = (path / SUBDIRECTORY).is_dir()
        if is_export:
            plan = _plan_restore(path / SUBDIRECTORY, config)
        else:
            plan = _plan_new(source, layout, config, Path(scratch))
        if plan.spec.model.kind != layout.kind or plan.spec.model.layers > len(source.tensors.shapes()):
            raise UserError(
                f"{path}: {SUBDIRECTORY}/model.json describes another model than the weights; export it again"
            )
        if layout.of_experts:
            source = regrouped(source, plan.spec.model)
        names = layout.our_names(source.tensors.shapes(), plan.spec.model)
        parameters = _check_shapes(source, names, plan)
        _check_left_out(source, layout, names, plan.spec)
        spec, weights = plan.spec, _weights(source, names, plan)
        if config.experts is not None:
            spec = dataclasses.replace(spec, model=upcycled_model(spec.model, config))
            weights = upcycled_weights(weights, config.experts)
            parameters = count_parameters(spec.build())
        write_model_files(temporary, spec, plan.manifest, plan.tokenizer_file)
        seal(temporary, write_shards(temporary / WEIGHTS_FILE, weights, shard_bytes))
    return Imported(layout.name, spec, parameters, plan.notes)


def _refuse_without_effect(path: Path, config: ImportConfig) -> None:
    """Raise UserError for keys that have no effect on this source, or without another key."""
    default = ImportConfig()
    if config.weights != default.weights and (path.is_dir() or path.suffix == Path(SINGLE_FILE).suffix):
        raise UserError(
            f"weights={config.weights} is not possible for {path}; only a Lightning checkpoint holds averages beside "
            "the raw weights, leave it out"
        )
    if config.experts is None and config.experts_per_token != default.experts_per_token:
        raise UserError(
            f"experts_per_token={config.experts_per_token} has no effect without experts; give experts=NUMBER, too, "
            "or leave it out"
        )


def _plan_restore(exported: Path, config: ImportConfig) -> _ImportPlan:
    """Plan the import of a directory that `scmdm export` wrote. Raises UserError for keys without effect."""
    default = ImportConfig()
    allowed = ("format", "experts", "experts_per_token")
    for name in (field.name for field in dataclasses.fields(config) if field.name not in allowed):
        if getattr(config, name) != getattr(default, name):
            raise UserError(
                f"{name}={getattr(config, name)} is not possible for {exported.parent}, an export of scmdm, whose "
                f"model is restored as it was; leave it out, or remove {exported} to import the layout alone"
            )
    stored = open_model(exported)
    conditioner = open_source(exported / CONDITIONER_FILE, "raw") if stored.spec.model.self_conditioned else None
    file = tokenizer_file(exported, stored.manifest)
    return _ImportPlan(stored.spec, stored.manifest, file, conditioner, mask_row=False, notes=())


def _plan_new(source: PublishedFiles, layout: PublishedLayout, config: ImportConfig, scratch: Path) -> _ImportPlan:
    """Plan the import of another project's model; saves its tokenizer in `scratch`."""
    with reading(source.path, f"model of the layout {layout.name}", "download it again"):
        given, source = source, _with_overrides(source, layout, config)
        model, diffusion = layout.architecture(source), layout.diffusion(source)
        diffusion = dataclasses.replace(diffusion, block_length=read_block_length(source, layout, config))
        notes, rows = layout.notes(source), matrix_shape(source, layout.published_name(EMBEDDING))[0]
        length = config.length or _length(source, layout.lengths)
    tokenizer, named = _tokenizer(source, config, rows)
    notes = [*named, *notes]
    notes += [f"{name}={shorten(field_of(given.config, name))} is ignored, as if absent" for name in config.ignore]
    if config.framing == "chats":
        _check_chats(tokenizer)
    if layout.names_mask(source):
        _check_trained_mask(source, config, tokenizer, rows)
    if "logit_shift" in _keys_of(layout):
        shift = _logit_shift(source, layout, config, tokenizer)
        changed: dict[str, Any] = {"logit_shift": shift}  # a key of this kind alone
        model = dataclasses.replace(model, **changed)
        notes.append(f"logit_shift={str(shift).lower()}")
    notes.append(f"block_length={diffusion.block_length or 'null'}")
    if "time_conditioning" in _keys_of(layout):
        notes.append(f"time_conditioning={str(vars(model)['time_conditioning']).lower()}")
    added = tokenizer.vocab_size - rows
    if added:
        notes.append(f"a mask token was added as id {tokenizer.mask_id}")
    spec = ModelSpec(model, diffusion, tokenizer.vocab_size, tokenizer.mask_id, length)
    try:
        validate_keys(spec)
        validate_spec(spec)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from error
    file = tokenizer.save(scratch)
    bos_policy = config.bos_policy or layout.bos_policy
    origin = {"imported_from": layout.name}
    description = Description(source.path.name, length, "loss", bos_policy, origin, framing=config.framing)
    manifest = make_manifest(tokenizer, file, {}, description)
    return _ImportPlan(spec, manifest, file, None, mask_row=bool(added), notes=tuple(notes))


def _keys_of(layout: PublishedLayout) -> set[str]:
    return {field.name for field in dataclasses.fields(DENOISERS.schema(layout.kind))}


def _with_overrides(source: PublishedFiles, layout: PublishedLayout, config: ImportConfig) -> PublishedFiles:
    """Apply the keys of `scmdm import` that replace or remove fields of the configuration. Raises UserError."""
    for key in ("time_conditioning", "logit_shift"):
        if getattr(config, key) is not None and key not in _keys_of(layout):
            raise UserError(f"{key}={getattr(config, key)} is not possible for model.kind={layout.kind}; leave it out")
    content = source.config
    for name in config.ignore:
        if field_of(content, name) is None:
            raise UserError(f"ignore={name}: the configuration of {source.path} has no such field; leave it out")
        content = _without(content, name.split("."))
    if config.time_conditioning is not None:
        content = _without(content, ["algo", "time_conditioning"])
        content = {**content, "time_conditioning": config.time_conditioning}
    return dataclasses.replace(source, config=content)


def field_of(content: Any, name: str) -> Any:
    """Return the field with a dotted name; None if there is none."""
    for part in name.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _without(content: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """Return the content without the field at a path, if it is there."""
    name, *inner = path
    if not inner:
        return {key: value for key, value in content.items() if key != name}
    nested = content.get(name)
    return {**content, name: _without(nested, inner)} if isinstance(nested, dict) else content


def _logit_shift(source: PublishedFiles, layout: PublishedLayout, config: ImportConfig, tokenizer: Tokenizer) -> bool:
    """Return whether a position is predicted from the one before it. Raises UserError when nothing says so."""
    names_mask = config.mask_id is None and getattr(tokenizer, "names_mask", True)
    stated = config.logit_shift
    if stated is None:
        stated = layout.logit_shift(source, names_mask or _id(source, "mask_token_id") is not None)
    if stated is None:
        raise UserError(
            f"{source.path} does not say whether a token is predicted at the position before it; give logit_shift=true "
            "(autoregressive models, and those whose sampler shifts logits to the right: Dream, DiffuLLaMA) or "
            "logit_shift=false (a masked position predicts its own token: LLaDA, dllm's A2D)"
        )
    return stated


def _length(source: PublishedFiles, names: Sequence[str]) -> int:
    """Return the model's own length of a sample."""
    for name in names:
        value = field_of(source.config, name)
        if value is not None and (type(value) is not int or not 2 <= value <= LONGEST):
            raise UserError(
                f"{source.path}: {name}={shorten(value)} in its configuration; expected 2 to {LONGEST}, or "
                "give length=NUMBER"
            )
        if value is not None:
            return int(value)
    raise UserError(f"{source.path} does not state the length of a sample; give length=NUMBER")


def _tokenizer(source: PublishedFiles, config: ImportConfig, rows: int) -> tuple[Tokenizer, list[str]]:
    """Return a tokenizer with an id per row of the embedding, or one more for the mask, and notes."""
    directory = source.path if source.path.is_dir() else source.path.parent
    given = Path(config.tokenizer) if config.tokenizer is not None else directory
    begin, ends = _published_ids(source, rows)
    if config.bos_id is not None and config.bos_id >= rows:
        raise UserError(f"bos_id={config.bos_id} is not possible; the model's embedding has {rows} rows")
    ids = ModelIds(rows, config.mask_id, config.bos_id, begin, ends, _id(source, "mask_token_id"))
    tokenizer = open_model_tokenizer(given, ids)
    if tokenizer.vocab_size > rows + 1 or (tokenizer.vocab_size > rows and tokenizer.mask_id != rows):
        raise UserError(
            f"tokenizer={given} has {tokenizer.vocab_size} tokens with the mask (id {tokenizer.mask_id}), but the "
            f"model's embedding has {rows} rows; give the tokenizer that the model was trained with"
        )
    ends_named = ", ".join(_named(tokenizer, end) for end in tokenizer.end_ids)
    return tokenizer, [
        f"mask {_named(tokenizer, tokenizer.mask_id)} of {tokenizer.vocab_size}",
        f"a sample begins with {_named(tokenizer, tokenizer.bos_id)} and ends with {ends_named}",
    ]


def _check_chats(tokenizer: Tokenizer) -> None:
    """Raise UserError unless the tokenizer has a chat template that scmdm supports."""
    try:
        _ = tokenizer.chat
    except UserError as error:
        raise UserError(f"framing=chats is not possible: {error}; or give another framing") from error


def _named(tokenizer: Tokenizer, id_: int) -> str:
    return f"{tokenizer.tokens([id_])[0]!r} (id {id_})"


def _check_trained_mask(source: PublishedFiles, config: ImportConfig, tokenizer: Tokenizer, rows: int) -> None:
    """Raise UserError unless the mask of a model that was trained with one is known, and has an embedding."""
    stated = config.mask_id is not None or _id(source, "mask_token_id") is not None
    if not stated and not getattr(tokenizer, "names_mask", True):
        raise UserError(
            f"{source.path} was trained with a mask, but neither its configuration (mask_token_id) nor its tokenizer "
            "names it; give mask_id=NUMBER"
        )
    if tokenizer.mask_id >= rows:
        raise UserError(
            f"{source.path} was trained with a mask, but mask_id={tokenizer.mask_id} has none of the {rows} rows of "
            "its embedding; give mask_id=NUMBER"
        )


def _id(source: PublishedFiles, name: str) -> int | None:
    value = source.config.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise UserError(
            f"{source.path}: {name}={shorten(value)} in its configuration is not a token id; give mask_id=NUMBER"
        )
    return value


def _published_ids(source: PublishedFiles, rows: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the ids of the token that begins a text, if there is one, and of those that end one. Raises UserError."""
    begins = _ids_in(source, "bos_token_id", rows, several=False)
    return next(iter(begins), None), _ids_in(source, "eos_token_id", rows, several=True)


def _ids_in(source: PublishedFiles, name: str, rows: int, *, several: bool) -> tuple[int, ...]:
    value = source.config.get(name)
    try:
        return token_ids(value if several else [value], rows)
    except ValueError as error:
        reason = f"{error}; correct it, or give ignore=[{name}] to take what the tokenizer says"
        raise PublishedConfig(source).refusal(name, value, reason) from error


def _check_shapes(source: PublishedFiles, names: dict[str, str], plan: _ImportPlan) -> int:
    """Compare names and shapes with the architecture and return the number of parameters. Raises UserError."""
    expected = {name: value.shape for name, value in plan.spec.build().named_parameters()}
    shapes = source.tensors.shapes()
    found: dict[str, torch.Size] = {}
    for theirs, ours in names.items():
        if ours in found:
            raise UserError(f"{source.path} has {ours} under two names, of which one is {theirs}; download it again")
        found[ours] = _imported_shape(ours, shapes[theirs], plan)
    if plan.conditioner is not None:
        added = plan.conditioner.tensors.shapes()
        for name in added:
            if not name.startswith(CONDITIONER_PREFIX):
                raise UserError(f"{plan.conditioner.path} has {name}, which is not of the conditioner; export it again")
        found |= added
    check_fit(expected, found, str(source.path))
    return sum(shape.numel() for shape in expected.values())


def _check_left_out(source: PublishedFiles, layout: PublishedLayout, names: dict[str, str], spec: ModelSpec) -> None:
    """Raise UserError unless the tensors that are not imported equal those that scmdm has in their place."""
    left_out = [name for name in source.tensors.shapes() if name not in names]
    head, embedding = layout.published_name(HEAD), layout.published_name(EMBEDDING)
    if head in left_out:
        left_out.remove(head)
        tied = _one(source, embedding).float()
        _require_equal(source, head, tied, f"{embedding}, to which the configuration ties it")
    frequencies = spec.build().rotary_emb.frequencies() if left_out else torch.empty(0)
    for name in left_out:
        _require_equal(source, name, frequencies, "the rotary frequencies of its configuration")


def _require_equal(source: PublishedFiles, name: str, expected: Tensor, reason: str) -> None:
    value = _one(source, name).float()
    if value.shape != expected.shape or not torch.allclose(value, expected, rtol=_HALF_PRECISION, atol=1e-9):
        raise UserError(f"{source.path}: {name} differs from {reason}; scmdm does not import such a model")


def _one(source: PublishedFiles, name: str) -> Tensor:
    return next(iter(source.tensors.read([name])))[1]


def _imported_shape(ours: str, shape: torch.Size, plan: _ImportPlan) -> torch.Size:
    grows = plan.mask_row and ours in (EMBEDDING, HEAD, HEAD_BIAS)
    return torch.Size((shape[0] + 1, *shape[1:])) if grows else shape


def _weights(source: PublishedFiles, names: dict[str, str], plan: _ImportPlan) -> Iterator[tuple[str, Tensor]]:
    """Iterate over scmdm's names and the tensors, file by file."""
    for group in source.tensors.groups():
        wanted = [name for name in group if name in names]
        for theirs, tensor in source.tensors.read(wanted) if wanted else ():
            yield names[theirs], _with_mask_row(names[theirs], tensor) if plan.mask_row else tensor
    if plan.conditioner is not None:
        for group in plan.conditioner.tensors.groups():
            yield from plan.conditioner.tensors.read(group)


def _with_mask_row(ours: str, tensor: Tensor) -> Tensor:
    """Append the mask's row: the mean embedding, or zeros in the head, because the mask's logit is minus infinity."""
    if ours == EMBEDDING:
        return torch.cat([tensor, tensor.float().mean(0, keepdim=True).to(tensor.dtype)])
    if ours in (HEAD, HEAD_BIAS):
        return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])
    return tensor
