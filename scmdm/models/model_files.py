"""Models on disk: `model.json` (what to build), safetensors (weights), the tokenizer and its manifest.

Other people's layouts: `scmdm.convert`.
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
from scmdm.config.model import LlamaConfig, ModelConfig
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import Tokenizer, load_tokenizer
from scmdm.diffusion.schedule import Schedule, make_schedule
from scmdm.errors import UserError
from scmdm.models.decoder import Llama
from scmdm.models.dit import DiT
from scmdm.models.lora import add_adapters, is_added
from scmdm.models.network import Network
from scmdm.models.tensor_files import read_tensors, tensor_shapes
from scmdm.system.files import atomic_write_text

MODEL_FILE, WEIGHTS_FILE = "model.json", "weights.safetensors"
TENSORS = "tensors"  # in a checkpoint: directory of sharded weights, averages and optimizer state, by prefix
WEIGHTS_PREFIX, EMA_PREFIX = "weights.", "ema."
_FORMAT = 1
_READ_AT_ONCE = 2**30  # bytes


@dataclass
class ModelSpec:
    """All that is needed to build a model and to know what it was trained on."""

    model: ModelConfig
    diffusion: DiffusionConfig
    vocab_size: int
    mask_id: int
    length: int
    step: int = 0
    tokens: int = 0
    classes: int = 0  # that model.labels tells apart

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.diffusion.schedule, eps=self.diffusion.eps, power=self.diffusion.power)

    def build(self) -> Network:
        """The model without weights, on the meta device: see `allocate`."""
        common: dict[str, Any] = {"vocab_size": self.vocab_size, "mask_id": self.mask_id, "schedule": self.schedule}
        with torch.device("meta"):
            model: Network = (
                Llama(self.model, **common)
                if self.model.kind == "llama"
                else DiT(self.model, **common, classes=self.classes)
            )
            if self.model.lora_rank:
                add_adapters(model.blocks, self.model)
        return model


@dataclass
class StoredModel:
    """A model on disk: all but its weights, which are read when they have a place to go."""

    spec: ModelSpec
    tokenizer: Tokenizer
    manifest: Manifest
    path: Path


@dataclass
class LoadedModel(StoredModel):
    """A model ready to sample."""

    model: Network


def write_model_files(directory: Path, spec: ModelSpec, manifest: Manifest, tokenizer_file: Path) -> None:
    """Write `model.json`, `manifest.json` and the tokenizer into `directory` (weights are written beside them)."""
    atomic_write_text(directory / MODEL_FILE, json.dumps({"format": _FORMAT, **asdict(spec)}, indent=2) + "\n")
    manifest.write(directory)
    shutil.copyfile(tokenizer_file, directory / manifest.tokenizer.file)


def spec_of(content: dict[str, Any]) -> ModelSpec:
    """A spec from what `asdict` made of it; KeyError or TypeError for anything else."""
    architecture = dict(content["model"])
    model = ModelConfig(**{**architecture, "llama": LlamaConfig(**architecture.get("llama", {}))})
    return ModelSpec(**{**content, "model": model, "diffusion": DiffusionConfig(**content["diffusion"])})


def read_spec(directory: Path) -> ModelSpec:
    """Read `model.json`; UserError when it is missing, malformed or of a newer format."""
    path = directory / MODEL_FILE
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise UserError(f"{path} has an unknown format; expected {_FORMAT}: upgrade scmdm")
        return spec_of(content)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a model: it has no {MODEL_FILE}; give a run, checkpoint or export"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint, or export the model again") from error


def open_model(directory: Path) -> StoredModel:
    """Read a model directory but for its weights. Raises UserError when files are missing or do not fit together."""
    spec = read_spec(directory)
    manifest = Manifest.read(directory)
    tokenizer = load_tokenizer(directory / manifest.tokenizer.file)
    if not manifest.vocab_size == tokenizer.vocab_size == spec.vocab_size:
        raise UserError(
            f"{directory}: the model has {spec.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}, its manifest "
            f"{manifest.vocab_size}; the files do not belong together: restore the directory"
        )
    # How attention is computed is no part of a model: it may have been trained on other hardware.
    spec.model.attention = "auto"
    return StoredModel(spec, tokenizer, manifest, directory)


def read_model(directory: Path, *, weights: str = "ema") -> LoadedModel:
    """Load a model directory onto the CPU; "ema" takes the averaged weights where there are any, "raw" never.

    Raises UserError when files are missing or damaged, or do not fit together.
    """
    stored = open_model(directory)
    model = stored.spec.build()
    allocate(model, torch.device("cpu"))
    read_weights(model, directory, weights=weights, alone=True)
    return LoadedModel(**vars(stored), model=model.eval())


def allocate(model: Network, device: torch.device, *, weights_on: torch.device | None = None) -> None:
    """Give a model that was built on the meta device, and perhaps sharded there, its memory; weights are undefined.

    `weights_on` puts the weights elsewhere than the tables that the model derives itself.
    """
    model.to_empty(device=weights_on or device)
    model.rotary_emb.to_empty(device=device)
    model.rotary_emb.reset_parameters()


def read_weights(
    model: Network, directory: Path, *, weights: str = "ema", new_conditioner: bool = False, alone: bool = False
) -> None:
    """Fill a model, whole or sharded, from a model directory, each rank reading what it holds.

    `new_conditioner` leaves conditioner and adapters alone where the directory has none. All ranks call this together,
    or one of them `alone`. Raises UserError when files are damaged, or of another architecture.
    """
    place, keys, found = _stored(directory, weights)
    own = dict(model.named_parameters())
    shapes = {name: size for name, (size, _) in found.items()}
    check_fit({n: p.shape for n, p in own.items()}, shapes, str(directory), new_conditioner=new_conditioner)
    into = {keys[name]: own[name].detach() for name in found}
    read_tensors(place, into, alone=alone)


def weights_of(directory: Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """The whole tensors of an export or, averaged ("ema") or not ("raw"), of a checkpoint, on the CPU."""
    return dict(iterate_weights(directory, weights=weights))


def iterate_weights(directory: Path, *, weights: str = "ema") -> Iterator[tuple[str, Tensor]]:
    """`weights_of`, in the precision that they are stored in and the order of their names, some at a time: what is not
    kept takes no memory.
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
    """Where a model directory has its tensors, and by name what they are called there, their shape and precision."""
    place = directory / TENSORS if (directory / TENSORS).is_dir() else directory
    shapes = tensor_shapes(place)
    # What a run does not train has no average.
    prefixes = ("",) if place == directory else (WEIGHTS_PREFIX, EMA_PREFIX) if weights == "ema" else (WEIGHTS_PREFIX,)
    keys = {key.removeprefix(prefix): key for prefix in prefixes for key in shapes if key.startswith(prefix)}
    return place, keys, {name: shapes[key] for name, key in keys.items()}


def load_weights(model: Network, weights: dict[str, Tensor], origin: str, *, new_conditioner: bool = False) -> None:
    """Copy weights into a model; UserError names the first that is missing, unknown or of another shape.

    `new_conditioner` keeps the fresh conditioner where `weights` has none: the first step of an adaptation.
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
    """UserError when weights are not those of a model; `new_conditioner`: they may lack what an adaptation adds."""
    absent = [n for n in expected if n not in found and not (new_conditioner and is_added(n))]
    unknown = [n for n in found if n not in expected]
    wrong = [n for n in found if n in expected and found[n] != expected[n]]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{origin}: {name} has shape {tuple(found[name])}, the model wants {tuple(expected[name])}; it is of "
            "another architecture"
        )
    if absent or unknown:
        problem = f"lacks {absent[0]}" if absent else f"has {unknown[0]}, which the model does not"
        raise UserError(f"{origin} {problem}; it is of another architecture")
