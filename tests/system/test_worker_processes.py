"""Worker processes end with their parent."""

import os
import signal
import subprocess
import sys

import pytest

from tests.distributed.launching import are_gone, wait_for_descendants

PARENT = """
import os, signal
from scmdm.system.worker_processes import worker_processes
if __name__ == "__main__":
    with worker_processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        signal.pause()
"""


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_no_worker(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert are_gone([worker])


FITTING = """
import itertools
from scmdm.data.tokenizers.sentencepiece_trainer import train_pieces
from scmdm.system.worker_processes import worker_processes
def fit():
    train_pieces(itertools.repeat("for ever"), {"vocab_size": 9})
if __name__ == "__main__":
    with worker_processes(1) as pool:
        pool.submit(fit).result()
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_tokenizer_that_a_worker_fits_ends_with_the_parent(tmp_path, sent):
    (tmp_path / "fitting.py").write_text(FITTING)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "fitting.py")], env=environment)
    (trainer,) = wait_for_descendants(parent, "scmdm.data.tokenizers.sentencepiece_trainer")
    parent.send_signal(sent)
    parent.wait()
    assert are_gone([trainer])
