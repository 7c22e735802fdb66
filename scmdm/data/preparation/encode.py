"""Last pass over a corpus, part by part: records -> ids -> sequences -> shards.

Legend: N records of a part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scmdm.config.preparation import PrepareConfig
from scmdm.data.preparation.fit_tokenizer import fitted_part, fitted_tokenizer
from scmdm.data.preparation.framing import FRAMERS, FramedSequence, Framer
from scmdm.data.preparation.records import Part, Record, Tally
from scmdm.data.preparation.scan import describe_place, scanned_records
from scmdm.data.preparation.shard_writer import Description, write_piece
from scmdm.data.preparation.source import Source
from scmdm.data.preparation.splits import by_position, is_held_out, split_of
from scmdm.data.tokenizers import OwnFraming, Tokenizer, UnknownSymbol
from scmdm.data.tokenizers.chat_template import EncodedChat, UnusableChat, turns_of

TRUNCATED = "truncated"  # records that lost their end
UNKNOWN_KEPT = "with unknown symbols"  # kept records, in which the tokenizer's token for them stands


class _Unusable(ValueError):
    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def encode(
    config: PrepareConfig, source: Source, part: Part, scanned: Path, fitted: Path, number: int, to: Path
) -> None:
    """Write the records of a part as shards, by split."""
    tokenizer, tally = fitted_tokenizer(fitted), Tally(refuse=config.on_dirty == "refuse")
    records = _records(config, source, part, scanned, fitted, number, tally)
    rows = _rows(config, source, part, tokenizer, records, tally)
    write_piece(to, rows, tokenizer, describe(config, source), config.shard_mb << 20, config.compression)
    (to / "counts.json").write_text(json.dumps({"counts": tally.counts, "places": tally.places}))


def _records(
    config: PrepareConfig, source: Source, part: Part, scanned: Path, fitted: Path, number: int, tally: Tally
) -> Iterator[tuple[str, Record]]:
    """Yield the records of a part with their splits, without duplicates."""
    repeated_N, place = fitted_part(fitted, number)
    hashes_N = np.load(scanned / "hashes.npy")
    columns = zip(scanned_records(scanned), hashes_N.tolist(), repeated_N.tolist(), strict=True)
    for at, (record, hash_, repeated) in enumerate(columns, place.first):
        if repeated:
            tally.leave_out("duplicate")
        elif by_position(config):
            yield "validation" if is_held_out(config, at, place.total) else "train", record
        else:
            yield split_of(config, source, part, record, hash_), record


def _rows(
    config: PrepareConfig,
    source: Source,
    part: Part,
    tokenizer: Tokenizer,
    records: Iterator[tuple[str, Record]],
    tally: Tally,
) -> Iterator[tuple[str, FramedSequence]]:
    """Yield the sequences of a part with their splits, and count kept and dropped records."""
    framers = dict[str, Framer]()
    own = tokenizer if isinstance(tokenizer, OwnFraming) else None  # once, because isinstance is slow for a protocol
    for split, record in records:
        framer = framers.setdefault(split, FRAMERS[config.framing](config.length, tokenizer))
        for version in _versions(source, split, record):
            try:
                if version.is_chat:
                    chat = _encoded_chat(tokenizer, version)
                    prompt, ids = list[int](), chat.ids
                    rows = [_conversation(config, version, chat, tokenizer)]
                else:
                    prompt, ids = _encoded(tokenizer, version)
                    if config.long_records == "truncate" and len(ids) > config.length - 2:
                        ids = ids[: config.length - 2]
                        tally.counts[TRUNCATED] += 1
                    rows = list(_sequences(config, source, version, prompt, ids, tokenizer, framer, own))
            except _Unusable as error:
                tally.drop(error.reason, partial(describe_place, source, part, record, error))
                continue
            if tokenizer.unk_id is not None and (tokenizer.unk_id in ids or tokenizer.unk_id in prompt):
                tally.note(UNKNOWN_KEPT, partial(describe_place, source, part, record))
            tally.counts["kept" if version is record else "mirrored"] += 1
            yield from ((split, row) for row in rows)
    for split, framer in framers.items():
        yield from ((split, row) for row in framer.finish())
        if framer.dropped:
            tally.counts["tokens left over"] += framer.dropped


def _versions(source: Source, split: str, record: Record) -> Iterator[Record]:
    """Yield a record and, in the training split, its mirror image, if the source has one."""
    yield record
    mirrored = source.mirror_image(record) if split == "train" else None
    if mirrored is not None:
        yield mirrored


def _encoded(tokenizer: Tokenizer, record: Record) -> tuple[list[int], list[int]]:
    """Return the ids of prompt and content. Raises _Unusable."""
    try:
        return tokenizer.encode(record.prompt) if record.prompt else [], tokenizer.encode(record.content)
    except UnknownSymbol as error:
        raise _Unusable(error.reason, str(error)) from error


def _encoded_chat(tokenizer: Tokenizer, record: Record) -> EncodedChat:
    """Return the ids of a conversation. Raises _Unusable."""
    try:
        return tokenizer.chat.encode(turns_of(json.loads(record.content)))
    except (UnknownSymbol, UnusableChat) as error:
        raise _Unusable(error.reason, str(error)) from error


def _conversation(config: PrepareConfig, record: Record, chat: EncodedChat, tokenizer: Tokenizer) -> FramedSequence:
    """Return the sequence of a conversation, which ends with [EOS]. Raises _Unusable."""
    end = [tokenizer.eos_id] if chat.ids[-1:] != [tokenizer.eos_id] else []
    ids = [*chat.ids, *end]
    if len(ids) > config.length:
        raise _Unusable("too long", f"{record.content[:80]!r} has {len(ids)} tokens")
    return FramedSequence(ids, record.label, given_mask=[*chat.given, *(False for _ in end)])


def _sequences(
    config: PrepareConfig,
    source: Source,
    record: Record,
    prompt: list[int],
    ids: list[int],
    tokenizer: Tokenizer,
    framer: Framer,
    own: OwnFraming | None,
) -> Iterator[FramedSequence]:
    """Yield the sequences that are complete after a record. Raises _Unusable."""
    if own is not None:
        yield FramedSequence(own.frame(ids), record.label)
        return
    whole = source.whole_records or record.prompt is not None
    if whole and len(prompt) + len(ids) > config.length - 2:
        raise _Unusable("too long", f"{record.text[:80]!r} has {len(prompt) + len(ids)} tokens")
    if record.prompt is not None:
        yield FramedSequence([tokenizer.bos_id, *prompt, *ids, tokenizer.eos_id], record.label, given=1 + len(prompt))
    else:
        yield from framer.add(ids, record.label)


def describe(
    config: PrepareConfig, source: Source, described: dict[str, Any] | None = None, counts: dict[str, int] | None = None
) -> Description:
    """Describe the data set for its manifest."""
    return Description(
        source.name,
        config.length,
        config.pad_policy,
        config.bos_policy,
        described or {},
        counts or {},
        source.labels,
        config.source.framing or config.framing,
    )
