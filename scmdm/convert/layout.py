"""Interface of a published layout: names of tensors, and the description of the architecture in `config.json`.

`scmdm.config.layouts` registers layouts by name; each family has a module in `scmdm.convert.families`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.layouts import LAYOUTS
from scmdm.config.model import ModelConfig
from scmdm.convert.published_files import PublishedFiles
from scmdm.errors import UserError
from scmdm.models.conditioner import CONDITIONER_PREFIX
from scmdm.models.model_files import ModelSpec

EMBEDDING, HEAD, HEAD_BIAS = "vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"
FINAL_NORM = "output_layer.norm_final.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _no_tensors(_: ModelConfig) -> Iterable[tuple[str, Tensor]]:
    return ()


@dataclass(frozen=True)
class TokenIds:
    """Ids of the specials for `config.json`. `eos` are all tokens that end a text."""

    bos: int
    eos: tuple[int, ...]
    pad: int
    mask: int

    def as_fields(self) -> dict[str, Any]:
        """Return the fields as `transformers` names them."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos)
        ids = {"bos": self.bos, "eos": eos, "pad": self.pad, "mask": self.mask}
        return {f"{role}_token_id": value for role, value in ids.items()}


def log_linear(_: PublishedFiles) -> DiffusionConfig:
    """Return the process of MDLM's models, which ends at `alpha_1 = 1e-3`."""
    return DiffusionConfig(eps=1e-3)


def _no_shift(_: PublishedFiles, has_mask: bool) -> bool:
    return False


def _no_mask_needed(_: PublishedFiles) -> bool:
    return False


@dataclass(frozen=True)
class PublishedLayout:
    """Tensor names and architecture description of a published model.

    Attributes:
        name: Value of the key `format`.
        kind: `model.kind` of the models that it describes.
        published_name: Maps our name of a parameter to the published one.
        recognises: Returns whether a source is in this layout.
        architecture: Reads the architecture from the configuration and shapes of a source. Raises UserError for an
            architecture that scmdm does not implement.
        describe: Makes the content of `config.json`.
        unsupported: Explains why a model of `kind` cannot be written in this layout; None if it can.
        block_field: Field of the configuration for the tokens per block; None: no place for it.
        of_blocks: Whether all models of this layout are models of blocks.
        logit_shift: Returns whether a position is predicted from the one before it, given a source and whether its
            files name a mask token; None if they do not say.
        names_mask: Returns whether a model was trained with a mask whose id cannot be inferred, so that its files or
            the user must give it.
        diffusion: Reads the process that the model was trained for.
        notes: Returns what a user should know about how the configuration was read.
        lengths: Fields of the configuration that state the length of a sample, dotted.
        derived: Suffixes of the names of published tensors that scmdm computes instead of reading.
        derived_tensors: Returns names and values of such tensors, for writing.
        bos_policy: `bos_policy` that models of this layout were trained with.
        of_experts: Whether all models of this layout have experts, whose tensors files hold one by one
            (`scmdm.convert.regrouped_tensors`).
        card_note: Sentence on the model card about programs that read this layout; may be empty.
    """

    name: str
    kind: str
    published_name: Callable[[str], str]
    recognises: Callable[[PublishedFiles], bool]
    architecture: Callable[[PublishedFiles], ModelConfig]
    describe: Callable[[ModelSpec, TokenIds], dict[str, Any]]
    unsupported: Callable[[ModelConfig], str | None]
    lengths: tuple[str, ...]
    block_field: str | None = None
    of_blocks: bool = False
    names_mask: Callable[[PublishedFiles], bool] = _no_mask_needed
    diffusion: Callable[[PublishedFiles], DiffusionConfig] = log_linear
    notes: Callable[[PublishedFiles], list[str]] = lambda _: []
    logit_shift: Callable[[PublishedFiles, bool], bool | None] = _no_shift
    derived: tuple[str, ...] = ()
    derived_tensors: Callable[[ModelConfig], Iterable[tuple[str, Tensor]]] = _no_tensors
    bos_policy: str = "given"
    of_experts: bool = False
    card_note: Callable[[ModelConfig], str] = lambda _: ""

    def our_names(self, published: Iterable[str], config: ModelConfig) -> dict[str, str]:
        """Map published names to ours, without derived tensors; an unknown name is mapped to itself."""
        kept = [name for name in published if not any(name.endswith(ending) for ending in self.derived)]
        ours = parameter_names(config)
        if HEAD not in ours:  # tied embedding: a published head is a copy of it
            kept = [name for name in kept if name != self.published_name(HEAD)]
        known = {self.published_name(name): name for name in ours}
        return {name: known.get(name, name) for name in kept}


def parameter_names(config: ModelConfig) -> list[str]:
    """List the names of a model's parameters, without the conditioner's."""
    model = ModelSpec(config, DiffusionConfig(), 2, 1, 2).build()
    return [name for name, _ in model.named_parameters() if not name.startswith(CONDITIONER_PREFIX)]


def renamed(block: Mapping[str, str], blocks: str, outer: Mapping[str, str]) -> Callable[[str], str]:
    """Make `PublishedLayout.published_name` from tables.

    `block` maps modules of a block, `blocks` is the published prefix of all blocks, `outer` maps other parameters.
    """

    def published_name(ours: str) -> str:
        if (match := _BLOCK.match(ours)) is None:
            return outer[ours]
        module, _, parameter = ours[match.end() :].rpartition(".")
        return f"{blocks}.{match[1]}.{block[module]}.{parameter}"

    return published_name


def find_layout(source: PublishedFiles, name: str) -> PublishedLayout:
    """Return the layout called `name`, or, for "auto", the one that recognises the source.

    Raises UserError when there is none.
    """
    if name != "auto":
        layout: PublishedLayout = LAYOUTS.load(name)
        return layout
    for candidate in map(LAYOUTS.load, LAYOUTS.names):
        if candidate.recognises(source):
            found: PublishedLayout = candidate
            return found
    example, kind = next(iter(source.tensors.shapes()), "no tensor"), source.config.get("model_type")
    layouts = "|".join(LAYOUTS.names)
    remedy = f"give format={layouts}" if kind is None else f"import a model of {layouts}"
    raise UserError(f"{source.path} is in no layout that scmdm reads (model_type {kind}, {example}); {remedy}")


def check_writable(layout: PublishedLayout, spec: ModelSpec) -> None:
    """Raise UserError when a layout cannot represent a model."""
    config = spec.model
    if config.kind != layout.kind:
        fitting = "|".join(name for name in LAYOUTS.names if LAYOUTS.load(name).kind == config.kind)
        raise UserError(f"format={layout.name} is not possible for model.kind={config.kind}; give format={fitting}")
    reason = _other_blocks(layout, spec.diffusion.block_length) or layout.unsupported(config)
    if reason is not None:
        raise UserError(f"format={layout.name} is not possible: {reason}; give format=scmdm or hub, or another layout")


def _other_blocks(layout: PublishedLayout, block_length: int | None) -> str | None:
    """Explain why a layout cannot state the blocks of a model; None if it can."""
    if block_length is not None and layout.block_field is None:
        return f"it has no place for diffusion.block_length={block_length}, without which a program hides no block"
    if block_length is None and layout.of_blocks:
        return "its models have blocks, but this one has diffusion.block_length=null"
    return None
