"""Model directories: `model.json` (architecture), safetensors (weights), the tokenizer and the data manifest.

Published layouts of other projects are read and written by `scmdm.convert`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.fields import key, validate_keys
from scmdm.config.model import DENOISERS, ModelConfig
from scmdm.data.manifest import MANIFEST_FILE, Manifest
from scmdm.data.tokenizers import Tokenizer, load_tokenizer
from scmdm.diffusion.schedule import Schedule, make_schedule
from scmdm.errors import UserError
from scmdm.models.experts.expert_block import whole_parameters
from scmdm.models.legacy import upgrade_model_keys
from scmdm.models.lora import add_adapters, is_added
from scmdm.models.network import Network
from scmdm.models.safetensors_headers import StoredTensor, require_finite, require_finite_all
from scmdm.models.tensor_files import iterate_tensors, read_tensors, tensor_shapes, used_ranges
from scmdm.system.files import atomic_write_text, sha256_file
from scmdm.system.untrusted import name_inside, parse_as, read_json

MODEL_FILE, WEIGHTS_FILE = "model.json", "weights.safetensors"
TENSORS = "tensors"  # directory of a checkpoint with sharded weights, averages and optimizer state
WEIGHTS_PREFIX, EMA_PREFIX = "weights.", "ema."
ROUTER = ".experts.router."  # in the names of its parameters
LONGEST = 2**24  # tokens of a sample
_FORMAT = 1
_LARGEST_DESCRIPTION = 2**20  # bytes of `model.json`
_RESTORE = "use another checkpoint, or export the model again"


@dataclass
class ModelSpec:
    """Architecture of a model, and the data and process that it was trained for."""

    model: ModelConfig
    diffusion: DiffusionConfig
    vocab_size: int = key(help="tokens, with the mask", at_least=2, at_most=2**31)
    mask_id: int = key(help="id of the mask", at_least=0, at_most=2**31)
    length: int = key(help="tokens of a sample", at_least=2, at_most=LONGEST)
    step: int = key(0, help="optimizer steps of its last run", at_least=0, at_most=2**62)
    tokens: int = key(0, help="tokens seen in its last run", at_least=0, at_most=2**62)
    classes: int = key(0, help="number of labels, with model.labels", at_least=0, at_most=2**31)

    @property
    def schedule(self) -> Schedule:
        """Noise schedule of the diffusion process."""
        return make_schedule(self.diffusion.schedule, eps=self.diffusion.eps, power=self.diffusion.power)

    def build(self) -> Network:
        """Build the model on the meta device; `allocate` gives it memory."""
        with torch.device("meta"):
            model: Network = DENOISERS.load(self.model.kind)(
                self.model,
                vocab_size=self.vocab_size,
                mask_id=self.mask_id,
                schedule=self.schedule,
                classes=self.classes,
            )
            model.block_length = self.diffusion.block_length
            if self.model.lora_rank:
                add_adapters(model.blocks, self.model)
        return model


@dataclass
class StoredModel:
    """A model directory without its weights, which `read_weights` reads into an allocated model."""

    spec: ModelSpec
    tokenizer: Tokenizer
    manifest: Manifest
    path: Path


class JointEvaluation(Protocol):
    """Evaluations that several ranks begin together."""

    def await_peers(self, on_evaluation: Callable[[], None]) -> None:
        """Take part in the evaluations of the other ranks until all ranks call this."""
        ...


@dataclass
class LoadedModel(StoredModel):
    """A model directory with its weights in memory, in evaluation mode."""

    model: Network
    joint: JointEvaluation | None = None  # of a model whose weights several ranks share

    @property
    def is_whole(self) -> bool:
        """Return whether this process holds all weights."""
        return self.joint is None

    def await_peers(self, on_evaluation: Callable[[], None]) -> None:
        """Wait until the ranks that share the weights have done their parts of some evaluations, as this one has.

        `on_evaluation` is called after each of theirs.
        """
        if self.joint is not None:
            self.joint.await_peers(on_evaluation)


def write_model_files(directory: Path, spec: ModelSpec, manifest: Manifest, tokenizer: Path) -> None:
    """Write `model.json`, `manifest.json` and the tokenizer into `directory` (weights are written beside them)."""
    atomic_write_text(directory / MODEL_FILE, json.dumps({"format": _FORMAT, **asdict(spec)}, indent=2) + "\n")
    manifest.write(directory)
    shutil.copyfile(tokenizer, name_inside(directory, manifest.tokenizer.file, directory / MANIFEST_FILE))


@dataclass
class _Description:
    """Content of `model.json` but for its format; the type of `model` depends on the kind of denoiser."""

    model: dict[str, Any]
    diffusion: DiffusionConfig
    vocab_size: int
    mask_id: int
    length: int
    step: int = 0
    tokens: int = 0
    classes: int = 0


def spec_of(content: Any, where: Path | str) -> ModelSpec:
    """Return the spec whose `asdict` is `content`, also from earlier versions.

    Raises UserError, which names the key and `where` the content is from, for keys that are unknown, missing, of
    another type or out of bounds. Nothing is built or allocated.
    """
    given = parse_as(_Description, content, where)
    try:
        keys = upgrade_model_keys(given.model)
        schema: type[ModelConfig] = DENOISERS.schema(keys["kind"])
        model = parse_as(schema, keys, "section model")
        spec = ModelSpec(**{**vars(given), "model": model})
        validate_keys(spec)
        model.validate()
        validate_spec(spec)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return spec


def validate_spec(spec: ModelSpec) -> None:
    """Raise UserError for a combination of architecture, data and process that cannot work."""
    if spec.diffusion.block_length is not None and getattr(spec.model, "time_conditioning", False):
        raise UserError(
            f"diffusion.block_length={spec.diffusion.block_length} is not possible with model.time_conditioning=true, "
            "because each block has its own time; leave one of them out"
        )
    if spec.mask_id >= spec.vocab_size:
        raise UserError(f"mask_id={spec.mask_id} is not possible; it must be below vocab_size={spec.vocab_size}")
    if spec.model.labels != (spec.classes > 0):
        raise UserError(
            f"classes={spec.classes} is not possible with model.labels={str(spec.model.labels).lower()}; it must be "
            f"{'above 0' if spec.model.labels else '0'}"
        )
    if spec.model.inject_layer >= spec.model.layers:
        raise UserError(
            f"model.inject_layer={spec.model.inject_layer} is not possible; it must be below model.layers="
            f"{spec.model.layers}"
        )
    top_k = spec.model.estimate_top_k
    if top_k is not None and top_k > spec.vocab_size:
        raise UserError(f"model.estimate_top_k={top_k} is not possible; it must be at most {spec.vocab_size} tokens")


def read_spec(directory: Path) -> ModelSpec:
    """Read `model.json`. Raises UserError when it is missing, malformed or of a newer format."""
    path = directory / MODEL_FILE
    try:
        content = read_json(path, "description of a model", limit=_LARGEST_DESCRIPTION, remedy=_RESTORE)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a model directory: it has no {MODEL_FILE}; give a run, a checkpoint or an export"
        ) from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != _FORMAT:
        remedy = "upgrade scmdm" if isinstance(found, int) and found > _FORMAT else _RESTORE
        raise UserError(f"{path}: format={found!r} is not possible; it must be {_FORMAT}; {remedy}")
    return spec_of(content, path)


def open_model(directory: Path) -> StoredModel:
    """Open a model directory without reading weights. Raises UserError when files are missing or inconsistent."""
    spec = read_spec(directory)
    manifest = Manifest.read(directory)
    file = tokenizer_file(directory, manifest)
    tokenizer = load_tokenizer(file)
    for name in ("vocab_size", "mask_id"):
        own, others = getattr(spec, name), (getattr(tokenizer, name), getattr(manifest, name))
        if others != (own, own):
            raise UserError(
                f"{directory}: {name}={own} in {MODEL_FILE}, {others[0]} in the tokenizer, {others[1]} in the "
                "manifest; the files belong to different models: restore the directory"
            )
    if manifest.length != spec.length or (spec.model.labels and len(manifest.labels) != spec.classes):
        raise UserError(
            f"{directory}: samples of {spec.length} tokens and {spec.classes} labels in {MODEL_FILE}, "
            f"{manifest.length} and {len(manifest.labels)} in the manifest; restore the directory"
        )
    # The attention kernel depends on the hardware, which may differ from that of the training.
    spec.model.attention = "auto"
    return StoredModel(spec, tokenizer, manifest, directory)


def tokenizer_file(directory: Path, manifest: Manifest) -> Path:
    """Return the tokenizer's file of a model directory. Raises UserError unless it is the one that was hashed."""
    path = directory / manifest.tokenizer.file
    if not path.is_file():
        raise UserError(f"tokenizer {path} is missing; restore the directory, or export the model again")
    if sha256_file(path) != manifest.tokenizer.sha256:
        raise UserError(f"tokenizer {path} does not match its SHA-256 in {MANIFEST_FILE}; restore the directory")
    return path


def read_model(
    directory: Path,
    *,
    weights: str = "ema",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Load a model directory onto `device` (None: the CPU), for sampling.

    `weights` is "raw" for the weights as trained, or "ema" for their averages (raw for parameters without an average).
    `dtype` is as in `set_dtype`. Raises UserError when files are missing, damaged or inconsistent.
    """
    stored = open_model(directory)
    model = stored.spec.build()
    set_dtype(model, dtype)
    found = match_weights(model, directory, weights=weights, alone=True)
    allocate(model, device or torch.device("cpu"))
    fill_weights(model, found, alone=True)
    return LoadedModel(**vars(stored), model=model.eval())


def set_dtype(model: Network, dtype: torch.dtype) -> None:
    """Set the dtype in which a model that is not yet allocated holds its parameters.

    Routers, which choose in float32, stay in it. With `model.head_precision=float32` so do all parameters outside of
    blocks: the output head, the embedding that may be tied to it, and a few others.
    """
    for name, parameter in model.named_parameters():
        if ROUTER in name:
            continue
        if model.config.head_precision != "float32" or name.startswith("blocks."):
            parameter.data = parameter.data.to(dtype)


def allocate(model: Network, device: torch.device, *, weights_on: torch.device | None = None) -> None:
    """Allocate a model that was built, and possibly sharded, on the meta device.

    Parameters are uninitialised, buffers are filled. `weights_on` is the device of the parameters, by default `device`.
    """
    model.to_empty(device=weights_on or device)
    model.rotary_emb.to_empty(device=device)
    model.rotary_emb.reset_parameters()


@dataclass(frozen=True)
class StoredWeights:
    """The parameters that a model directory holds."""

    place: Path  # directory of the tensors
    keys: dict[str, str]  # names there, by parameter
    tensors: dict[str, StoredTensor]  # by parameter


def match_weights(
    model: Network, directory: Path, *, weights: str = "ema", new_conditioner: bool = False, alone: bool = False
) -> StoredWeights:
    """Compare names, shapes and dtypes of stored weights with a built model; call this before `allocate`.

    All ranks call this together, unless `alone`. `new_conditioner` permits missing conditioner and adapters. Raises
    UserError when files are damaged or of another architecture.
    """
    found = _stored(directory, weights, alone=alone)
    own = {name: parameter.shape for name, parameter in whole_parameters(model).items()}
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    check_fit(own, shapes, str(directory), new_conditioner=new_conditioner)
    for tensor in found.tensors.values():
        _ = tensor.dtype  # refuses what is not floating-point
    return found


def fill_weights(model: Network, found: StoredWeights, *, alone: bool = False) -> None:
    """Fill a model, whole or sharded, with the weights that `match_weights` found; each rank reads only its shards.

    All ranks call this together, unless `alone`. Raises UserError for files that changed, and for NaN or infinity.
    """
    own = whole_parameters(model)
    read_tensors(found.place, {key: own[name] for name, key in found.keys.items()}, alone=alone)
    require_finite_all(((name, own[name]) for name in found.keys), found.place)


def iterate_weights(directory: Path, *, weights: str = "ema") -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of a model directory in the order of their names, in their stored dtype.

    One of them is in memory at a time; `weights` as in `read_model`.
    """
    found = _stored(directory, weights)
    names = {found.keys[name]: name for name in sorted(found.tensors)}
    for stored_name, tensor in iterate_tensors(found.place, names):
        require_finite(names[stored_name], tensor, found.place)
        yield names[stored_name], tensor


def used_bytes(directory: Path, *, weights: str = "ema", alone: bool = True) -> dict[str, list[tuple[int, int]]]:
    """Return by file, relative to `directory`, the ranges of bytes that a reader of `weights` uses.

    Optimizer state is not among them. Unless `alone`, all ranks call this together, and only rank 0 gets the ranges.
    Raises UserError when a file is damaged.
    """
    found = _stored(directory, weights, alone=alone)
    ranges = used_ranges(found.place, found.keys.values(), alone=alone)
    return {str((found.place / name).relative_to(directory)): used for name, used in ranges.items()}


def _stored(directory: Path, weights: str, *, alone: bool = True) -> StoredWeights:
    place = directory / TENSORS if (directory / TENSORS).is_dir() else directory
    if place == directory and weights == "raw":
        raise UserError(
            f"weights=raw is not possible for {directory}: an export has one set of weights; leave the key out, or "
            "give the run"
        )
    tensors = tensor_shapes(place, alone=alone)
    # Frozen parameters have no average: "ema" falls back to the weights, parameter by parameter.
    prefixes = ("",) if place == directory else (WEIGHTS_PREFIX, EMA_PREFIX) if weights == "ema" else (WEIGHTS_PREFIX,)
    keys = {key.removeprefix(prefix): key for prefix in prefixes for key in tensors if key.startswith(prefix)}
    return StoredWeights(place, keys, {name: tensors[key] for name, key in keys.items()})


def check_fit(
    expected: dict[str, torch.Size], found: dict[str, torch.Size], origin: str, *, new_conditioner: bool = False
) -> None:
    """Raise UserError unless names and shapes match; `new_conditioner` permits missing conditioner and adapters."""
    absent = [n for n in expected if n not in found and not (new_conditioner and is_added(n))]
    unknown = [n for n in found if n not in expected]
    wrong = [n for n in found if n in expected and found[n] != expected[n]]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{origin}: {name} has shape {tuple(found[name])}, the model has {tuple(expected[name])}; the weights are "
            "of another architecture"
        )
    if absent or unknown:
        problem = f"lacks {absent[0]}" if absent else f"has {unknown[0]}, which the model does not have"
        raise UserError(f"{origin} {problem}; the weights are of another architecture")
