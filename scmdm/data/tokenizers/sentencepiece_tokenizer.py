"""Tokenizer of a sentencepiece model.

In a model trained here, ids 0 to 3 are [PAD], [BOS], [EOS] and [MASK]. A model trained elsewhere keeps its own ids for
them, and missing ones are appended to its vocabulary, the mask first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import sentencepiece

from scmdm.config.fields import PathKind, key
from scmdm.config.preparation import TokenizerConfig
from scmdm.data.tokenizers.base import SPECIALS, Content, GridLayout, Tokenizer, as_text, check_ids, text_ids
from scmdm.data.tokenizers.sentencepiece_trainer import train_pieces
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_bytes
from scmdm.system.untrusted import read_bytes, reading

_MASKS = (SPECIALS[3], "<mask>")


@dataclass
class SentencePieceConfig(TokenizerConfig):
    """Keys of sentencepiece tokenizers."""

    path: str | None = key(
        None, path=PathKind.INPUT, formerly=("tokenizer_path",), help=".model file; null: train a model on the corpus"
    )
    vocab_size: int = key(
        2048, formerly=("vocab_size",), help="vocabulary size of the model that is trained", at_least=1, at_most=2**24
    )


class SentencePieceTokenizer(Tokenizer):
    """Tokenizer of a sentencepiece model, with an id for each special."""

    Config = SentencePieceConfig
    kind = "sentencepiece"
    learns_from_text = True

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = self._pieces = self.vocab_size = self._processor.vocab_size()
        masks = (self._processor.piece_to_id(piece) for piece in _MASKS)
        mask_id = next((i for i in masks if i != self._processor.unk_id()), -1)
        found = [mask_id, self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()]
        for role, id_ in enumerate(found):
            if id_ < 0:
                found[role] = self.vocab_size
                self.vocab_size += 1
        self.mask_id, self.bos_id, self.eos_id, self.pad_id = found
        self.unk_id = self._processor.unk_id()
        names = {
            self.pad_id: SPECIALS[0],
            self.bos_id: SPECIALS[1],
            self.eos_id: SPECIALS[2],
            self.mask_id: SPECIALS[3],
        }
        self._appended = {id_: name for id_, name in names.items() if id_ >= pieces}

    @classmethod
    def open(cls, config: SentencePieceConfig, *, padded: bool) -> Self | None:
        if config.path is None:
            return None
        with reading(f"tokenizer.path={config.path}", "sentencepiece model", "give a .model file"):
            opened = cls(read_bytes(Path(config.path)))
            check_ids(opened)
        return opened

    @classmethod
    def build(cls, config: Any, *, symbols: Iterable[str], sample: Iterable[str], layout: GridLayout | None) -> Self:
        return cls.fit(sample, config.vocab_size)

    @classmethod
    def fit(cls, corpus: Iterable[str], vocab_size: int) -> Self:
        """Train a unigram model with byte fallback, which encodes and restores any text.

        Raises UserError when the corpus does not allow the vocabulary size.
        """
        pad, bos, eos, mask = SPECIALS
        options = {
            "vocab_size": vocab_size,
            "model_type": "unigram",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "allow_whitespace_only_pieces": True,
            "max_sentence_length": 1 << 20,
            "num_threads": 1,
            "pad_id": 0,
            "pad_piece": pad,
            "bos_id": 1,
            "bos_piece": bos,
            "eos_id": 2,
            "eos_piece": eos,
            "unk_id": 4,
            "control_symbols": [mask],
            "minloglevel": 2,
        }
        try:
            return cls(train_pieces(corpus, options))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"tokenizer.vocab_size={vocab_size} does not fit this corpus: {reason}; choose another size"
            ) from error

    def _ids_of(self, content: Content) -> list[int]:
        # Sentencepiece's trainer makes no piece for a newline; byte fallback encodes it.
        return self._processor.encode(as_text(content))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([i for i in text_ids(ids, self) if i < self._pieces])

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._appended.get(int(i)) or self._processor.id_to_piece(int(i)) for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.model"
        atomic_write_bytes(path, self._model)
        return path
