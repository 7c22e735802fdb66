"""Sentencepiece.

In a model that we train ids 0 to 3 are padding, beginning, end and mask. Another model keeps the ids that it has for
them, and gets those that it lacks behind its pieces, the mask first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from scmdm.data.tokenizers.base import SPECIALS, Content, as_text, text_ids
from scmdm.data.tokenizers.sentencepiece_trainer import train_pieces
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_bytes

_MASKS = (SPECIALS[3], "<mask>")


class SentencePieceTokenizer:
    """A sentencepiece model with our specials among its pieces."""

    kind = "sentencepiece"

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
        names = {
            self.pad_id: SPECIALS[0],
            self.bos_id: SPECIALS[1],
            self.eos_id: SPECIALS[2],
            self.mask_id: SPECIALS[3],
        }
        self._appended = {id_: name for id_, name in names.items() if id_ >= pieces}

    @classmethod
    def open(cls, path: Path) -> SentencePieceTokenizer:
        """A model that was trained elsewhere. Raises UserError when the file is missing or none."""
        try:
            return cls(path.read_bytes())
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"tokenizer_path={path} is no sentencepiece model: {reason}; give a .model file") from error

    @classmethod
    def fit(cls, corpus: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        """Train a unigram model with byte fallback: every text has an encoding and decodes to itself."""
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
                f"vocab_size={vocab_size} does not fit this corpus: {reason}; choose another vocab_size"
            ) from error

    def encode(self, content: Content) -> list[int]:
        # A newline is not a piece of its own in sentencepiece's trainer; byte fallback carries it through.
        return self._processor.encode(as_text(content))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([i for i in text_ids(ids, self) if i < self._pieces])

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._appended.get(int(i)) or self._processor.id_to_piece(int(i)) for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.model"
        atomic_write_bytes(path, self._model)
        return path
