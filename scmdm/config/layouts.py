"""Registry of published layouts: how other projects name tensors and describe a model."""

from __future__ import annotations

from scmdm.config.registry import Registry

LAYOUTS = Registry(
    "format",
    "scmdm.layouts",
    {
        "mdlm": "scmdm.convert.families.mdlm:MDLM",
        "llada": "scmdm.convert.families.llada:LLADA",
        "dream": "scmdm.convert.families.llama:DREAM",
        "llama": "scmdm.convert.families.llama:LLAMA",
        "qwen2": "scmdm.convert.families.llama:QWEN2",
    },
)
