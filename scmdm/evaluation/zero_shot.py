"""Zero-shot perplexity: likelihood of a model on texts that it was not trained on.

Texts are tokenized and framed as the model's own data set. With the keys of the table in docs/guides/protocols.md, the
sequences are those of MDLM's and Duo's published perplexities.

Legend: N sequences, L length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.text import TextConfig, TextSource
from scmdm.config.training import TrainConfig
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.framing import ConcatenatingFramer, Framer, RecordFramer
from scmdm.data.preparation.records import Tally
from scmdm.data.tokenizers import Tokenizer, UnknownSymbol
from scmdm.diffusion.likelihood import Nelbo, exp_or_inf
from scmdm.diffusion.state import Sequences
from scmdm.errors import UserError
from scmdm.evaluation.divided_nelbo import NelboSettings, divided_nelbo
from scmdm.models.model_files import LoadedModel
from scmdm.runtime.divided_work import ResultParts
from scmdm.training.padding import own_lengths
from scmdm.training.validation import to_device

_LARGEST = 1 << 30  # characters, which are held in memory
_EMPTY = "dropped: empty"
_STRATUM = 16  # sequences over which times are stratified
_PART_BYTES = 1 << 40  # larger than any file, so that files are not split


@dataclass(frozen=True)
class ZeroShot:
    """Likelihood of texts under a model."""

    nelbo: Nelbo  # nats per token of the model's tokenizer
    tokens_per_word: float  # tokens that count in the NELBO; of joined texts, those of the texts with their end marks

    @property
    def perplexity(self) -> float:
        """Upper bound of the perplexity per token."""
        return self.nelbo.perplexity

    @property
    def word_perplexity(self) -> float:
        """Upper bound of the perplexity per whitespace-separated word.

        It is comparable between tokenizers (Radford et al., 2019, section 3.1).
        """
        return exp_or_inf(self.nelbo.mean * self.tokens_per_word)


def read_texts(path: Path, *, key: str = "text", unit: str = "documents", detokenize: str = "none") -> list[str]:
    """Read the texts of a file or folder, in the formats of the source `text`.

    Raises UserError if there are none, and for one that cannot be read: a likelihood without it would not be that of
    the corpus that is named.
    """
    config = TextConfig(path=str(path), text_key=key, unit=unit, detokenize=detokenize, split_by="hash")
    source, tally = TextSource(config, length=0), Tally()
    found, size = list[str](), 0
    for part in source.parts(_PART_BYTES):
        for record in source.records(part, tally):
            text = str(record.text)
            found.append(text)
            size += len(text)
            if size > _LARGEST:
                raise UserError(f"{path} has more than {_LARGEST:,} characters; give a smaller file")
        for reason, places in tally.places.items():
            if reason != _EMPTY:
                raise UserError(f"{path}: {reason} {tally.counts[reason]}, first {places[0]}; correct it")
    if not found:
        raise UserError(f"{path} contains no usable text ({dict(tally.counts)}); give another file, or another key")
    return found


def frame_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    manifest: Manifest,
    *,
    end_marks: bool = True,
    group: int | None = None,
) -> np.ndarray:
    """Tokenize, frame and pad texts as the data set of `manifest`; returns (N, L) int64.

    Texts of a packed data set are not packed: each has its own sequence. In blocks of joined texts, [EOS] follows each
    text if `end_marks`, and blocks start anew, without the tokens that are left over, after each `group` texts. Raises
    UserError if a text contains a symbol outside the vocabulary, if all texts together are shorter than one block, or
    for `end_marks` and `group` with another framing.
    """
    in_blocks = manifest.framing == "concatenate"
    if not in_blocks and (not end_marks or group is not None):
        raise UserError(
            f"end_marks={end_marks}, group={group} is not possible for a model of data with "
            f"framing={manifest.framing}; leave both out"
        )

    def framer() -> Framer:
        if in_blocks:
            return ConcatenatingFramer(manifest.length, tokenizer, end_marks=end_marks)
        return RecordFramer(manifest.length, tokenizer)

    size = group or max(1, len(texts))
    groups = ((framer(), texts[at : at + size]) for at in range(0, len(texts), size))
    rows = [row for own, some in groups for text in some for row in own.add(encode_text(tokenizer, text), None)]
    if not rows:
        raise UserError(f"the texts are shorter than one block of {manifest.length} tokens; give more text")
    ids_NL = np.full((len(rows), manifest.length), manifest.padding_id, np.int64)
    for ids_L, row in zip(ids_NL, rows, strict=True):
        ids_L[: len(row.ids)] = row.ids
    return ids_NL


def zero_shot(
    loaded: LoadedModel,
    texts: Sequence[str],
    settings: NelboSettings | None = None,
    *,
    condition: bool = False,
    end_marks: bool = True,
    group: int | None = None,
    padding: TrainConfig | None = None,
    parts: ResultParts | None = None,
) -> ZeroShot | None:
    """Estimate the NELBO of texts under a model (MDLM, arXiv 2406.07524, section 5).

    The ranks of a job share the sequences, as `divided_nelbo` says; the result is None on all but rank 0. `end_marks`
    and `group` are those of `frame_texts`, which raises UserError. `padding` has the rule for the lengths of padded
    sequences; None: that of the data.
    """
    rows_NL = frame_texts(texts, loaded.tokenizer, loaded.manifest, end_marks=end_marks, group=group)
    framed = _FramedTexts(torch.from_numpy(rows_NL), loaded.manifest, padding)
    own = {"data": loaded.manifest.fingerprint(), "lengths": None if padding is None else padding.pad_multiple}
    kept = None if parts is None else parts.of(texts=hashlib.sha256(rows_NL.tobytes()).hexdigest(), **own)
    nelbo = divided_nelbo(loaded, framed, settings or NelboSettings(), condition=condition, parts=kept)
    if nelbo is None:
        return None
    tokens = nelbo.tokens
    if loaded.manifest.framing == "concatenate":  # what is left over at the end is in no block
        tokens = sum(len(encode_text(loaded.tokenizer, text)) + end_marks for text in texts)
    return ZeroShot(nelbo, tokens / max(1, sum(len(text.split()) for text in texts)))


@dataclass(frozen=True)
class _FramedTexts:
    """Sequences of texts, as a `HeldOut`."""

    ids_NL: Tensor
    manifest: Manifest
    padding: TrainConfig | None

    def __len__(self) -> int:
        return len(self.ids_NL)

    def strata(self) -> list[Tensor]:
        return list(torch.arange(len(self)).split(_STRATUM))

    def batches_of(
        self, numbers: Sequence[int], device: torch.device, *, size: int, labels: bool = False
    ) -> Iterator[Sequences]:
        for own in torch.tensor(numbers).split(size):
            ids_BL = self.ids_NL[own]
            lengths_B = None if self.padding is None else own_lengths(ids_BL, self.manifest, self.padding)
            batch = {"tokens": ids_BL, "index": own}
            yield to_device(batch, self.manifest, device, lengths_B=lengths_B).cropped()


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text without special tokens. Raises UserError for a symbol outside the vocabulary."""
    try:
        return tokenizer.encode(text)
    except UnknownSymbol as error:
        raise UserError(f"{text[:60]!r}: {error}; it is not in the model's vocabulary") from error
