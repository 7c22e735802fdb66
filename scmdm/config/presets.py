"""Published methods as values of configuration keys.

A preset defines a method by some keys, which other values contradict, and has defaults of others, which a configuration
may override. `scmdm.config.loading` applies presets below all keys that are given.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """Values by dotted key, from the root of the configuration."""

    defining: dict[str, object]
    defaults: dict[str, object] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, object]:
        """Values of all keys that the preset sets."""
        return self.defining | self.defaults


_RATE, _CARRIED, _MIXING = "self_conditioning.rate", "model.carried", "model.mixing"
_FROM = "self_conditioning.carried_from"

PRESETS = {
    "scmdm": Preset({_RATE: 1.0, _CARRIED: "estimate", _MIXING: "added", _FROM: "own"}),
    "loopholing": Preset(
        {_CARRIED: "hidden", _MIXING: "added", "model.conditioner": "norm", _FROM: "own"}, {_RATE: 1.0}
    ),
    "soft_masking": Preset(
        {_CARRIED: "estimate", _MIXING: "interpolated", "model.confidence": "entropy", _FROM: "own"},
        {_RATE: 1.0, "model.estimate_top_k": 3},
    ),
    "residual_context": Preset(
        {_CARRIED: "estimate", _MIXING: "interpolated", "model.confidence": "entropy", _FROM: "base"},
        {_RATE: 1.0, "model.confidence_slope": -5.0},
    ),
    "analog_bits": Preset({_RATE: 0.5, _CARRIED: "estimate", _MIXING: "added", _FROM: "own"}),
}
