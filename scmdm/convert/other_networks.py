"""Published networks that scmdm does not implement, which are refused with the reason.

They are recognised by `model_type` and by names of tensors. What is in neither list is refused as an unknown layout.
"""

from __future__ import annotations

import re

from scmdm.convert.published_files import PublishedFiles
from scmdm.errors import UserError

_DENSE = "import LLaDA-MoE or LLaDA2 instead, or a dense model (LLaDA 8B, Dream 7B, SDAR 1.7B to 8B, Qwen3)"
_DECODER = "import a decoder instead (configs/text/ar-to-diffusion.yaml), or train a base of that size"
_MIXTURE = "it is a mixture of experts"
# By a pattern of `model_type`: what scmdm has no layer for, and what to do.
_TYPES = {
    r".*moe.*|mixtral|deepseek_v\d|dbrx|jamba|gpt_oss": (_MIXTURE, _DENSE),
    r"bert|roberta|xlm-roberta|distilbert|electra|albert|camembert|mpnet": (
        "it has learned absolute positions and norms after each part",
        _DECODER,
    ),
    r"modernbert.*": ("its layers alternate between local and global attention, with a GeGLU of fused maps", _DECODER),
    r"deberta.*": ("its attention scores depend on relative positions", _DECODER),
    r"gemma.*": ("it has soft-capped logits or norms with an offset, and further norms", _DECODER),
}
_MIXTURES = ("llada", "llada2_moe")  # layouts with experts, which report unsupported features themselves
_EXPERT = re.compile(r"\.experts?[._]")


def refuse_other_networks(source: PublishedFiles) -> None:
    """Raise UserError, which names the network and the reason, for a network that scmdm is known not to implement."""
    kind = str(source.config.get("model_type")).lower()
    if kind in _MIXTURES:
        return
    experts = next((name for name in source.tensors.shapes() if _EXPERT.search(name)), None)
    if experts is not None:
        reason, remedy = f"{_MIXTURE} ({experts})", _DENSE
    else:
        found = (entry for pattern, entry in _TYPES.items() if re.fullmatch(pattern, kind))
        reason, remedy = next(found, ("", ""))
    if reason:
        raise UserError(f"{source.path} has model_type={kind}, which scmdm does not implement: {reason}; {remedy}")
