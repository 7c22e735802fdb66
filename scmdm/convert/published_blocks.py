"""Tokens per block of a published model, from its files and the keys of `scmdm import`."""

from __future__ import annotations

from scmdm.config.conversion import ImportConfig
from scmdm.convert.layout import PublishedLayout
from scmdm.convert.published_config import PublishedConfig
from scmdm.convert.published_files import PublishedFiles
from scmdm.errors import UserError
from scmdm.models.model_files import LONGEST

_BLOCK_TRAINED = "bd3lm"  # in the names of dllm's models; their configurations are those of its other models


def read_block_length(source: PublishedFiles, layout: PublishedLayout, config: ImportConfig) -> int | None:
    """Return the tokens per block; None for a model without blocks.

    Raises UserError when nothing states those of a model that has blocks, or when files and key differ.
    """
    published, field, given = PublishedConfig(source), layout.block_field, config.block_length
    stated = published.integer(field, high=LONGEST) if field is not None and published.has(field) else None
    if stated is not None and given not in (None, stated):
        raise published.refusal(
            str(field), stated, f"but block_length={given}; leave out block_length, or add ignore=[{field}]"
        )
    found = stated or given
    if found is None and layout.of_blocks:
        raise UserError(
            f"{source.path}: {field} is not in its configuration, but models of the layout {layout.name} have blocks; "
            "give block_length=NUMBER, the tokens per block that the model was trained with"
        )
    if found is None and any(_BLOCK_TRAINED in name.lower() for name in _names(source)):
        raise UserError(
            f"{source.path} is called {_BLOCK_TRAINED} (block diffusion), but its configuration does not state the "
            "tokens per block; give block_length=NUMBER, or rename it if it was trained without blocks"
        )
    return found


def _names(source: PublishedFiles) -> list[str]:
    folder = source.path if source.path.is_dir() else source.path.parent
    return [folder.resolve().name, str(source.config.get("_name_or_path", ""))]
