"""Run `scmdm train` in this process and print the CPU time at the end of each part before its first step.

This is a separate module, because the imports of `benchmarks.start` would be counted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any


def main(arguments: list[str]) -> None:
    """Run the command with these arguments, whose configuration must end after one step."""
    ends: dict[str, float] = {}

    def end(part: str) -> None:
        ends.setdefault(part, time.process_time())

    def watched(function: Callable[..., Any], before: str | None, after: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if before is not None:
                end(before)
            result = function(*args, **options)
            end(after)
            return result

        return call

    end("interpreter")
    import torch  # noqa: F401

    end("import torch")
    from scmdm import cli
    from scmdm.training import trainer

    end("other imports")
    trainer.open_data = watched(trainer.open_data, "configuration", "data set")
    trainer.build_engine = watched(trainer.build_engine, None, "model and optimizer")
    trainer.train_step = watched(trainer.train_step, "run directory, loader, first batch", "first step")
    status = cli.main(["train", *arguments])
    print(json.dumps(ends))
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
