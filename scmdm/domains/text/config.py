"""Keys of the text metrics, which the domains text and responses share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scmdm.config.fields import PathKind, key
from scmdm.domains.interface import MetricKeys
from scmdm.domains.text.causal_scorer import check_scorer
from scmdm.errors import UserError
from scmdm.system.package_data import package_folder


@dataclass
class TextMetricKeys(MetricKeys):
    """Section `metrics` for models of text."""

    scorer: str | None = key(
        None,
        path=PathKind.INPUT,
        help="directory of a transformers causal model, for generative perplexity; null: an n-gram model",
    )
    protocol: str = key(
        "text",
        help="tokens that the scorer scores: all of a text but the first; mdlm: as MDLM's and Duo's code, all tokens "
        "but the first of a chunk; of its ends of text only the first one, unless that is the chunk's first token "
        "(docs/guides/protocols.md)",
        choices=("text", "mdlm"),
    )
    mauve: bool = key(False, help="MAUVE in features of the scorer")

    @property
    def exclusive_setup(self) -> bool:
        """A scorer is loaded and tried before anything is sampled for it."""
        return self.scorer is not None

    def validate(self) -> None:
        if self.scorer is not None:
            check_scorer(Path(self.scorer))
        if self.protocol != "text" and self.scorer is None:
            raise UserError(
                f"metrics.protocol={self.protocol} needs a causal model; set metrics.scorer to its directory ("
                "gpt2-large for published values)"
            )
        if self.mauve and self.scorer is None:
            raise UserError("metrics.mauve=true needs features of a causal model; set metrics.scorer to its directory")
        if self.mauve:
            package_folder("mauve", "metrics.mauve=true", "text")


@dataclass
class PlainTextMetricKeys(TextMetricKeys):
    """Section `metrics` for models of text without prompts."""

    known_words: bool = key(
        False, help="share of whole words that occur in the training split, which is read: for models of characters"
    )
