"""Models on disk: `model.json` (what to build), safetensors (weights), the tokenizer and its manifest.

The weights' names are those of MDLM's published checkpoints without their `backbone.` prefix; `from_mdlm` and `to_mdlm`
map the one onto the other.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from scmdm.config.schema import DiffusionConfig, ModelConfig
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import Tokenizer, load_tokenizer
from scmdm.diffusion.schedule import Schedule, make_schedule
from scmdm.errors import UserError
from scmdm.files import atomic_write_bytes, atomic_write_text
from scmdm.model.dit import DiT
from scmdm.model.tensors import read_tensors, tensor_shapes

MODEL_FILE, WEIGHTS_FILE = "model.json", "weights.safetensors"
TENSORS = "tensors"  # in a checkpoint: directory of sharded weights, averages and optimizer state, by prefix
WEIGHTS_PREFIX, EMA_PREFIX = "weights.", "ema."
_FORMAT = 1
_MDLM_PREFIX = "backbone."
_MDLM_DERIVED = ("rotary_emb.inv_freq",)


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

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.diffusion.schedule, eps=self.diffusion.eps, power=self.diffusion.power)

    def build(self) -> DiT:
        """A freshly initialised model; the caller keys torch's generator."""
        return DiT(self.model, vocab_size=self.vocab_size, mask_id=self.mask_id, schedule=self.schedule)


@dataclass
class LoadedModel:
    """A model ready to sample or to adapt, with its tokenizer and the data set's manifest."""

    model: DiT
    spec: ModelSpec
    tokenizer: Tokenizer
    manifest: Manifest
    path: Path


def write_model_files(directory: Path, spec: ModelSpec, manifest: Manifest, tokenizer_file: Path) -> None:
    """Write `model.json`, `manifest.json` and the tokenizer into `directory` (weights are written beside them)."""
    atomic_write_text(directory / MODEL_FILE, json.dumps({"format": _FORMAT, **asdict(spec)}, indent=2) + "\n")
    manifest.write(directory)
    shutil.copyfile(tokenizer_file, directory / manifest.tokenizer.file)


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, complete or not at all."""
    atomic_write_bytes(path, to_safetensors({name: value.contiguous().cpu() for name, value in weights.items()}))


def read_spec(directory: Path) -> ModelSpec:
    """Read `model.json`; UserError when it is missing, malformed or of a newer format."""
    path = directory / MODEL_FILE
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise UserError(f"{path} has an unknown format; expected {_FORMAT}: upgrade scmdm")
        model, diffusion = ModelConfig(**content.pop("model")), DiffusionConfig(**content.pop("diffusion"))
        return ModelSpec(model=model, diffusion=diffusion, **content)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a model: it has no {MODEL_FILE}; give a run, checkpoint or export"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint, or export the model again") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; UserError when it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; use another checkpoint, or export the model again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint, or export the model again") from error


def read_model(directory: Path, *, weights: str = "ema") -> LoadedModel:
    """Load a model directory; "ema" takes the averaged weights where there are any, "raw" never.

    Raises UserError when files are missing or damaged, or do not fit together.
    """
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
    model = spec.build()
    load_weights(model, weights_of(directory, weights=weights), str(directory))
    return LoadedModel(model.eval(), spec, tokenizer, manifest, directory)


def weights_of(directory: Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """The whole tensors of an export or, averaged ("ema") or not ("raw"), of a checkpoint, on the CPU."""
    if not (directory / TENSORS).is_dir():
        return read_weights(directory / WEIGHTS_FILE)
    shapes = tensor_shapes(directory / TENSORS)
    averaged = weights == "ema" and any(name.startswith(EMA_PREFIX) for name in shapes)
    prefix = EMA_PREFIX if averaged else WEIGHTS_PREFIX
    found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes.items() if name.startswith(prefix)}
    read_tensors(directory / TENSORS, found, alone=True)
    return {name.removeprefix(prefix): value for name, value in found.items()}


def load_weights(model: DiT, weights: dict[str, Tensor], origin: str, *, new_conditioner: bool = False) -> None:
    """Copy weights into a model; UserError names the first that is missing, unknown or of another shape.

    `new_conditioner` keeps the fresh conditioner where `weights` has none: the first step of an adaptation.
    """
    expected = dict(model.named_parameters())
    absent = [n for n in expected if n not in weights and not (new_conditioner and n.startswith("conditioner."))]
    unknown = [n for n in weights if n not in expected]
    wrong = [n for n in weights if n in expected and weights[n].shape != expected[n].shape]
    if wrong:
        found, wanted = tuple(weights[wrong[0]].shape), tuple(expected[wrong[0]].shape)
        raise UserError(
            f"{origin}: {wrong[0]} has shape {found}, the model wants {wanted}; it is of another architecture"
        )
    if absent or unknown:
        problem = f"lacks {absent[0]}" if absent else f"has {unknown[0]}, which the model does not"
        raise UserError(f"{origin} {problem}; it is of another architecture")
    with torch.no_grad():
        for name, value in weights.items():
            expected[name].copy_(value)


def from_mdlm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published MDLM weights (`backbone.*`) under our names; tables that we derive are left out."""
    names = {name: name.removeprefix(_MDLM_PREFIX) for name in weights}
    return {ours: weights[theirs] for theirs, ours in names.items() if ours not in _MDLM_DERIVED}


def to_mdlm(weights: dict[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """Our weights under MDLM's names, with the rotary table that it stores; the conditioner's follow suit."""
    inv_freq = 1.0 / 10_000 ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    return {_MDLM_PREFIX + name: value for name, value in {**weights, "rotary_emb.inv_freq": inv_freq}.items()}
