"""Find duplicates among more records than fit into memory, by one range of hashes at a time.

Legend: N records of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

RECORDS_AT_ONCE = 1 << 24


def duplicates(
    hashes: Sequence[np.ndarray], rows: Sequence[np.ndarray], at_once: int = RECORDS_AT_ONCE
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of a part with its rows whose hash an earlier row of this or an earlier part also has.

    A part may be yielded repeatedly, and parts in any order. Among 6 billion distinct records, one pair is expected to
    share its 64-bit hash.

    Args:
        hashes: sorted hashes of each part, uint64 (N,), possibly memory-mapped.
        rows: rows that these hashes belong to, int64 (N,), possibly memory-mapped.
        at_once: number of hashes held in memory.
    """
    ranges = max(1, -(-sum(map(len, hashes)) // at_once))
    bounds = np.array([(2**64 * index) // ranges for index in range(1, ranges)], np.uint64)
    cuts = [[0, *np.searchsorted(hashes_N, bounds).tolist(), len(hashes_N)] for hashes_N in hashes]
    for index in range(ranges):
        spans = [slice(cut[index], cut[index + 1]) for cut in cuts]
        part = np.repeat(np.arange(len(spans)), [span.stop - span.start for span in spans])
        merged = np.concatenate([hashes_N[span] for hashes_N, span in zip(hashes, spans, strict=True)])
        row = np.concatenate([rows_N[span] for rows_N, span in zip(rows, spans, strict=True)])
        order = np.lexsort((row, part, merged))
        repeated = order[1:][np.diff(merged[order]) == 0]
        for number in np.unique(part[repeated]).tolist():
            yield number, row[repeated[part[repeated] == number]]
