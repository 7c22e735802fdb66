"""`python -m scmdm.data.tokenizers.sentencepiece_trainer`: run sentencepiece's trainer.

The trainer ignores signals, so that it runs in a process of its own.

Options come as JSON in the first argument, texts as lines of JSON on standard input; the model goes to standard output.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import sentencepiece

from scmdm.system.signals import end_with_parent


def train_pieces(texts: Iterable[str], options: dict[str, Any]) -> bytes:
    """A trained model. Raises RuntimeError, with sentencepiece's reason, when it cannot be trained.

    However this is left, by a signal too, the process ends, and on Linux when this process is killed.
    """
    command = [sys.executable, "-m", "scmdm.data.tokenizers.sentencepiece_trainer", json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            try:
                process.stdin.writelines(json.dumps(text).encode() + b"\n" for text in texts)
            except BrokenPipeError:  # it has ended, and says why
                process.stdin = None
            model, error = process.communicate()
        except BaseException:
            process.kill()
            raise
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
