"""A rank that never starts is named by every rank that does."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests.processes import popen

pytestmark = pytest.mark.slow

PROGRAM = """
from datetime import timedelta
import torch
from scmdm.errors import UserError
from scmdm.system.process_group import current_world, process_group
from tests.distributed.gathering import all_gather_object
try:
    with process_group(current_world(), torch.device("cpu"), needed=True, arrival=timedelta(seconds=8)):
        print("ranks", all_gather_object(current_world().rank))
except UserError as error:
    print("error", error)
"""


def start(ranks, size, program=PROGRAM):
    """Start some ranks of a group of `size` as SLURM does; returns their outputs."""
    port = str(free_port())
    processes = []
    for rank in ranks:
        variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(popen([sys.executable, "-c", program], env={**os.environ, **variables}, **options))
    return [process.communicate(timeout=120)[0] for process in processes]


def free_port():
    server = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    return server.port


def test_all_ranks_meet():
    assert all("ranks [0, 1, 2]" in output for output in start([0, 1, 2], 3))


@pytest.mark.parametrize(
    ("ranks", "size", "missing"), [([0, 1, 3], 5, "2,4"), ([1, 2], 3, "rank 0")], ids=["others", "rank 0"]
)
def test_every_rank_names_the_ranks_that_never_start(ranks, size, missing):
    for rank, output in zip(ranks, start(ranks, size), strict=True):
        (line,) = [line for line in output.splitlines() if line.startswith("error")]
        assert missing in line and f"rank {rank} " in line, output
