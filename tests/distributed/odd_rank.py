"""`scmdm` with an odd rank 1: `torchrun ... -m tests.distributed.odd_rank KIND VALUE ARGUMENT ...`.

Without torchrun the only process is the odd one.
"""

import ctypes
import itertools
import os
import signal
import sys


def another_package(path, arguments):
    """Run the copy of scmdm in a directory."""
    environment = {**os.environ, "PYTHONPATH": path}
    os.chdir(path)
    os.execve(sys.executable, [sys.executable, "-m", "scmdm", *arguments], environment)


def another_key(override, arguments):
    return scmdm([*arguments, override])


def blocked_read(fifo, arguments):
    """Its disk hangs: the 150th sample is read from a pipe without a writer."""
    from scmdm.data.dataset import TokenDataset

    read, count = TokenDataset.__getitem__, itertools.count(1)

    def read_from_a_disk_that_hangs(dataset, at):
        if next(count) == 150:
            with open(fifo) as pipe:
                pipe.read()
        return read(dataset, at)

    TokenDataset.__getitem__ = read_from_a_disk_that_hangs
    return scmdm(arguments)


def stuck_library(step, arguments):
    """A C call that holds the GIL does not return."""
    from scmdm.training import trainer

    train_step, count = trainer.train_step, itertools.count(1)

    def call_a_library_that_hangs(*given, **keys):
        if next(count) == int(step):
            ctypes.PyDLL(None).sleep(3600)
        return train_step(*given, **keys)

    trainer.train_step = call_a_library_that_hangs
    return scmdm(arguments)


def killed_in_a_save(step, arguments):
    """It dies when its tensors of the save of a step are written, before the hashes are gathered."""
    from scmdm.models import tensor_files

    write = tensor_files.write_file

    def write_and_die(path, *given):
        hashed = write(path, *given)
        if f"step_{int(step):08d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return hashed

    tensor_files.write_file = write_and_die
    return scmdm(arguments)


def scmdm(arguments):
    from scmdm.cli import main

    return main(arguments)


if __name__ == "__main__":
    kind, value, *rest = sys.argv[1:]
    odd = os.environ.get("RANK", "1") == "1"
    sys.exit(globals()[kind](value, rest) if odd else scmdm(rest))
