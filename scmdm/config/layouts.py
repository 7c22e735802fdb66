"""Registry of published layouts: how other projects name tensors and describe a model."""

from __future__ import annotations

from scmdm.config.registry import Registry

LAYOUTS = Registry(
    "format",
    "scmdm.layouts",
    {
        "mdlm": "scmdm.convert.families.mdlm:MDLM",
        "llada": "scmdm.convert.families.decoders:LLADA",
        "dream": "scmdm.convert.families.decoders:DREAM",
        "llama": "scmdm.convert.families.decoders:LLAMA",
        "mistral": "scmdm.convert.families.decoders:MISTRAL",
        "qwen2": "scmdm.convert.families.decoders:QWEN2",
        "qwen3": "scmdm.convert.families.decoders:QWEN3",
        "sdar": "scmdm.convert.families.decoders:SDAR",
        "llada_moe": "scmdm.convert.families.mixtures:LLADA_MOE",
        "llada2": "scmdm.convert.families.mixtures:LLADA2",
        "granite": "scmdm.convert.families.decoders:GRANITE",
    },
)
