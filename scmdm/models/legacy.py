"""Model descriptions that earlier versions wrote, converted on reading.

Earlier versions kept the keys of the decoder in a section `llama`, called that kind `llama`, wrote the keys of every
kind into each description, and had `estimate_rank`, an approximate search for the estimate's tokens. The first ones had
no key `kind`, only the DiT. `compile` was true or false.
"""

from __future__ import annotations

from typing import Any

from scmdm.errors import UserError

_DIT_KEYS = ("condition_width", "time_conditioning", "labels")


def upgrade_model_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Return the section `model` of a `model.json` or `config.yaml` with current keys; `content` is not changed.

    `estimate_rank` is dropped: the estimate is then computed exactly.
    """
    keys = {"kind": "dit"} | {name: value for name, value in content.items() if name != "estimate_rank"}
    if isinstance(compiled := keys.get("compile"), bool):
        keys["compile"] = "block" if compiled else "none"
    if "llama" not in keys:
        return keys
    decoder_keys = keys.pop("llama")
    if not isinstance(decoder_keys, dict):
        raise UserError(f"model.llama={decoder_keys!r:.60} is not a section; restore the file")
    if keys.get("kind") == "llama":
        keys = {name: value for name, value in keys.items() if name not in _DIT_KEYS}
        keys |= {"kind": "decoder", **decoder_keys}
    return keys
