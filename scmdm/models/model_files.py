"""Model directories: `model.json` (architecture), safetensors (weights), the tokenizer and the data manifest.

Published layouts of other projects are read and written by `scmdm.convert`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.model import DENOISERS, ModelConfig
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import Tokenizer, load_tokenizer
from scmdm.diffusion.schedule import Schedule, make_schedule
from scmdm.errors import UserError
from scmdm.models.legacy import upgrade_model_keys
from scmdm.models.lora import add_adapters, is_added
from scmdm.models.network import Network
from scmdm.models.tensor_files import read_tensors, tensor_shapes
from scmdm.system.files import atomic_write_text

MODEL_FILE, WEIGHTS_FILE = "model.json", "weights.safetensors"
TENSORS = "tensors"  # directory of a checkpoint with sharded weights, averages and optimizer state
WEIGHTS_PREFIX, EMA_PREFIX = "weights.", "ema."
_FORMAT = 1
_READ_AT_ONCE = 2**30  # bytes of tensors in memory at a time


@dataclass
class ModelSpec:
    """Architecture of a model, and the data and process that it was trained for."""

    model: ModelConfig
    diffusion: DiffusionConfig
    vocab_size: int
    mask_id: int
    length: int  # tokens of a sample
    step: int = 0  # optimizer steps of its last run
    tokens: int = 0  # tokens seen in its last run
    classes: int = 0  # number of labels, with model.labels

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


@dataclass
class LoadedModel(StoredModel):
    """A model directory with its weights in memory, in evaluation mode."""

    model: Network


def write_model_files(directory: Path, spec: ModelSpec, manifest: Manifest, tokenizer_file: Path) -> None:
    """Write `model.json`, `manifest.json` and the tokenizer into `directory` (weights are written beside them)."""
    atomic_write_text(directory / MODEL_FILE, json.dumps({"format": _FORMAT, **asdict(spec)}, indent=2) + "\n")
    manifest.write(directory)
    shutil.copyfile(tokenizer_file, directory / manifest.tokenizer.file)


def spec_of(content: dict[str, Any]) -> ModelSpec:
    """Return the spec whose `asdict` is `content`, also from earlier versions.

    Raises KeyError or TypeError for other content, UserError for an unknown `kind`.
    """
    keys = upgrade_model_keys(content["model"])
    model = DENOISERS.schema(keys["kind"])(**keys)
    return ModelSpec(**{**content, "model": model, "diffusion": DiffusionConfig(**content["diffusion"])})


def read_spec(directory: Path) -> ModelSpec:
    """Read `model.json`. Raises UserError when it is missing, malformed or of a newer format."""
    path = directory / MODEL_FILE
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise UserError(f"{path} has an unknown format; this scmdm reads format {_FORMAT}: upgrade scmdm")
        return spec_of(content)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a model directory: it has no {MODEL_FILE}; give a run, a checkpoint or an export"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint, or export the model again") from error


def open_model(directory: Path) -> StoredModel:
    """Open a model directory without reading weights. Raises UserError when files are missing or inconsistent."""
    spec = read_spec(directory)
    manifest = Manifest.read(directory)
    tokenizer = load_tokenizer(directory / manifest.tokenizer.file)
    if not manifest.vocab_size == tokenizer.vocab_size == spec.vocab_size:
        raise UserError(
            f"{directory}: vocabulary of {spec.vocab_size} in {MODEL_FILE}, {tokenizer.vocab_size} in the tokenizer, "
            f"{manifest.vocab_size} in the manifest; the files belong to different models: restore the directory"
        )
    # The attention kernel depends on the hardware, which may differ from that of the training.
    spec.model.attention = "auto"
    return StoredModel(spec, tokenizer, manifest, directory)


def read_model(directory: Path, *, weights: str = "ema") -> LoadedModel:
    """Load a model directory onto the CPU, for sampling.

    `weights` is "raw" for the weights as trained, or "ema" for their averages (raw for parameters without an average).
    Raises UserError when files are missing, damaged or inconsistent.
    """
    stored = open_model(directory)
    model = stored.spec.build()
    allocate(model, torch.device("cpu"))
    read_weights(model, directory, weights=weights, alone=True)
    return LoadedModel(**vars(stored), model=model.eval())


def allocate(model: Network, device: torch.device, *, weights_on: torch.device | None = None) -> None:
    """Allocate a model that was built, and possibly sharded, on the meta device.

    Parameters are uninitialised, buffers are filled. `weights_on` is the device of the parameters, by default `device`.
    """
    model.to_empty(device=weights_on or device)
    model.rotary_emb.to_empty(device=device)
    model.rotary_emb.reset_parameters()


def read_weights(
    model: Network, directory: Path, *, weights: str = "ema", new_conditioner: bool = False, alone: bool = False
) -> None:
    """Fill a model, whole or sharded, from a model directory; each rank reads only its shards.

    With `new_conditioner` the conditioner and adapters keep their values where the directory has none. All ranks call
    this together, unless `alone`. Raises UserError when files are damaged or of another architecture.
    """
    place, keys, found = _stored(directory, weights)
    own = dict(model.named_parameters())
    shapes = {name: size for name, (size, _) in found.items()}
    check_fit({n: p.shape for n, p in own.items()}, shapes, str(directory), new_conditioner=new_conditioner)
    into = {keys[name]: own[name].detach() for name in found}
    read_tensors(place, into, alone=alone)


def weights_of(directory: Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """Return the whole tensors of a model directory by name, on the CPU; `weights` as in `read_model`."""
    return dict(iterate_weights(directory, weights=weights))


def iterate_weights(directory: Path, *, weights: str = "ema") -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of a model directory in the order of their names, in their stored dtype.

    At most about 1 GiB of them is in memory at a time; `weights` as in `read_model`.
    """
    place, keys, shapes = _stored(directory, weights)
    names = sorted(shapes)
    while names:
        batch: dict[str, Tensor] = {}
        while names and (not batch or sum(value.nbytes for value in batch.values()) < _READ_AT_ONCE):
            size, dtype = shapes[name := names.pop(0)]
            batch[name] = torch.empty(size, dtype=dtype)
        read_tensors(place, {keys[name]: value for name, value in batch.items()}, alone=True)
        yield from batch.items()


def _stored(directory: Path, weights: str) -> tuple[Path, dict[str, str], dict[str, tuple[torch.Size, torch.dtype]]]:
    """Return the directory of the tensors, and for each parameter its key there, and its shape and dtype."""
    place = directory / TENSORS if (directory / TENSORS).is_dir() else directory
    shapes = tensor_shapes(place)
    # Frozen parameters have no average: "ema" falls back to the weights, parameter by parameter.
    prefixes = ("",) if place == directory else (WEIGHTS_PREFIX, EMA_PREFIX) if weights == "ema" else (WEIGHTS_PREFIX,)
    keys = {key.removeprefix(prefix): key for prefix in prefixes for key in shapes if key.startswith(prefix)}
    return place, keys, {name: shapes[key] for name, key in keys.items()}


def load_weights(model: Network, weights: dict[str, Tensor], origin: str, *, new_conditioner: bool = False) -> None:
    """Copy weights into a model. Raises UserError, which names a missing, unknown or misshapen tensor.

    With `new_conditioner` the conditioner and adapters keep their values where `weights` has none.
    """
    expected = dict(model.named_parameters())
    shapes = {name: value.shape for name, value in weights.items()}
    check_fit({n: p.shape for n, p in expected.items()}, shapes, origin, new_conditioner=new_conditioner)
    with torch.no_grad():
        for name, value in weights.items():
            expected[name].copy_(value)


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
