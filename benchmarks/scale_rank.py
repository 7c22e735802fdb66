"""One rank of `benchmarks.scale`: run a command of scmdm in this process and write what it counted.

torchrun ... -m benchmarks.scale_rank DIRECTORY adapt|evaluate ...
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.counting import (
    Collectives,
    HashedBytes,
    OpenedTensorFiles,
    ValidatedSequences,
    bytes_read,
    peak_memory,
    rank,
    watched,
)

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
            "sequences validated at once": self._validated.largest,
            "collectives of a step": self._collectives.count,
            "bytes of these collectives": self._collectives.bytes,
            "peak memory": peak_memory(),
        }


class ZeroCounts:
    """Bytes that DeepSpeed's engine exchanges to turn its fragments into rows at a save."""

    def __init__(self) -> None:
        from scmdm.distributed.deepspeed import DeepspeedEngine

        self._collectives, pack = Collectives(), DeepspeedEngine.pack

        @functools.wraps(pack)
        def counted(*args: Any, **options: Any) -> Any:
            with self._collectives:
                return pack(*args, **options)

        DeepspeedEngine.pack = counted  # type: ignore[method-assign]

    def finish(self) -> dict[str, int]:
        """Return all counts."""
        return {"exchanged at a save, ZeRO-3": self._collectives.bytes}


class EvaluationCounts:
    """Counts of one evaluation, of a model whose weights the ranks share."""

    def __init__(self) -> None:
        from scmdm.evaluation import divided_nelbo, evaluate
        from scmdm.sampling import generation

        self._hashed, self._opened = HashedBytes(), OpenedTensorFiles()
        self.found = {"evaluated sequences": 0, "samples drawn": 0, "shared weights of a rank": 0}
        load, draw, terms = evaluate.load_as_configured, generation.sample, divided_nelbo.nelbo_terms

        def loading(*args: Any, **options: Any) -> Any:
            loaded = load(*args, **options)
            self.found["hashed to evaluate"] = self._hashed.count
            self.found["files of tensors opened"] = self._opened.count
            self.found["bytes of their headers"] = self._opened.header_bytes
            held = sum(local_part(parameter).nbytes for parameter in loaded.model.parameters())
            self.found["shared weights of a rank"] = held
            return loaded

        def drawing(model: Any, templates_BL: Tensor, *args: Any, **options: Any) -> Any:
            self.found["samples drawn"] += len(templates_BL)
            return draw(model, templates_BL, *args, **options)

        def estimating(model: Any, batches: Any, *args: Any, **options: Any) -> Any:
            self.found["evaluated sequences"] += sum(map(len, batches))
            return terms(model, batches, *args, **options)

        for module, name, counted in (
            (evaluate, "load_as_configured", loading),
            (generation, "sample", drawing),
            (divided_nelbo, "nelbo_terms", estimating),
        ):
            setattr(module, name, counted)

    def finish(self) -> dict[str, int]:
        """Return all counts."""
        return {**self.found, "peak memory of an evaluation": peak_memory()}


def local_part(value: Tensor) -> Tensor:
    """This rank's part of a tensor that may be distributed."""
    return value.to_local() if isinstance(value, DTensor) else value


def main(arguments: list[str]) -> int:
    """Run the command, and write `rank_R.json` into the directory."""
    from scmdm import cli

    directory, *command = arguments
    if command[0] == "evaluate":
        counts: AdaptationCounts | ZeroCounts | EvaluationCounts = EvaluationCounts()
    else:
        counts = ZeroCounts() if "engine=deepspeed" in command else AdaptationCounts()
    status = cli.main(command)
    if status == 0:
        (Path(directory) / f"rank_{rank()}.json").write_text(json.dumps(counts.finish()))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
