"""Train a sentencepiece model in a process of its own, because the trainer ignores signals.

`python -m scmdm.data.tokenizers.sentencepiece_trainer OPTIONS` takes the trainer's options as JSON, reads the texts as
JSON strings, one per line, from standard input, and writes the model to standard output.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import sentencepiece

from scmdm.errors import UserError
from scmdm.system.signals import end_with_parent


def train_pieces(texts: Iterable[str], options: dict[str, Any]) -> bytes:
    """Train a model and return its bytes.

    Raises RuntimeError with sentencepiece's reason when that fails, and UserError when the training process is killed.

    The training process ends with this call, also when a signal interrupts it and, on Linux, when this process is
    killed.
    """
    command = [sys.executable, "-m", "scmdm.data.tokenizers.sentencepiece_trainer", json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            try:
                process.stdin.writelines(json.dumps(text).encode() + b"\n" for text in texts)
            except BrokenPipeError:  # the process has ended; its standard error says why
                process.stdin = None
            model, error = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        raise UserError(
            f"the trainer of sentencepiece was killed by signal {-process.returncode}, perhaps for lack of memory; "
            "repeat the command with more memory, or with a smaller corpus"
        )
    if process.returncode != 0:
        lines = error.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"the trainer ended with status {process.returncode}")
    return model


def _main() -> int:
    end_with_parent()
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=map(json.loads, sys.stdin.buffer), model_writer=buffer, **json.loads(sys.argv[1])
        )
    except RuntimeError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    sys.stdout.buffer.write(buffer.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
