"""Sentencepiece.

Ids 0 to 3 are padding, beginning, end and mask.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from scmdm.data.tokenizers.base import SPECIALS, Content, as_text, text_ids
from scmdm.errors import UserError
from scmdm.files import atomic_write_bytes


class SentencePieceTokenizer:
    """A sentencepiece model with our specials among its pieces."""

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.pad_id, self.bos_id, self.eos_id, self.mask_id = (self._processor.piece_to_id(s) for s in SPECIALS)

    @classmethod
    def fit(cls, corpus: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        """Train a unigram model with byte fallback: every text has an encoding and decodes to itself."""
        buffer = io.BytesIO()
        pad, bos, eos, mask = SPECIALS
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus),
                model_writer=buffer,
                vocab_size=vocab_size,
                model_type="unigram",
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 20,
                num_threads=1,
                pad_id=0,
                pad_piece=pad,
                bos_id=1,
                bos_piece=bos,
                eos_id=2,
                eos_piece=eos,
                unk_id=4,
                control_symbols=[mask],
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"vocab_size={vocab_size} does not fit this corpus: {reason}; choose another vocab_size"
            ) from error
        return cls(buffer.getvalue())

    def encode(self, content: Content) -> list[int]:
        # A newline is not a piece of its own in sentencepiece's trainer; byte fallback carries it through.
        return self._processor.encode(as_text(content))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([i for i in text_ids(ids, self) if i < self.vocab_size])

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._processor.id_to_piece(int(i)) for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.model"
        atomic_write_bytes(path, self._model)
        return path
