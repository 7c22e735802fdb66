"""One rank of `benchmarks.scale`: run `scmdm adapt` in this process and write what it counted.

torchrun ... -m benchmarks.scale_rank DIRECTORY CONFIG key=value ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.counting import Collectives, HashedBytes, ValidatedSequences, bytes_read, peak_memory, rank, watched

_WINDOW = (2, 3)  # collectives are counted from the start of one of these steps to that of the other


class AdaptationCounts:
    """Counts by phase of one adaptation."""

    def __init__(self) -> None:
        from scmdm.training import trainer

        self._hashed, self._validated, self._collectives = HashedBytes(), ValidatedSequences(), Collectives()
        self._steps, self._read = 0, bytes_read()
        self.found: dict[str, int] = {}
        trainer.train_step = watched(trainer.train_step, self._step_begins)

    def _step_begins(self) -> None:
        self._steps += 1
        if self._steps == 1:
            self.found["hashed at opening"] = self._hashed.count
            self.found["read at opening"] = bytes_read() - self._read
        if self._steps == _WINDOW[0]:
            self._collectives.__enter__()
        if self._steps == _WINDOW[1]:
            self._collectives.__exit__(None, None, None)

    def finish(self) -> dict[str, int]:
        """Return all counts; whatever is hashed after the opening belongs to the save."""
        return {
            **self.found,
            "hashed at the save": self._hashed.count - self.found["hashed at opening"],
            "validated sequences": self._validated.count,
            "collectives of a step": self._collectives.count,
            "bytes of these collectives": self._collectives.bytes,
            "peak memory": peak_memory(),
        }


def main(arguments: list[str]) -> int:
    """Run the adaptation, and write `rank_R.json` into the directory."""
    from scmdm import cli

    counts = AdaptationCounts()
    directory, *command = arguments
    status = cli.main(["adapt", *command])
    if status == 0:
        (Path(directory) / f"rank_{rank()}.json").write_text(json.dumps(counts.finish()))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
