"""Real ranks join several process groups, one after the other, as in a study."""

import pytest
import torch.distributed as dist

from tests.distributed.launching import launch
from tests.distributed.test_missing_rank import start

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from scmdm.errors import InUseError, UserError
from scmdm.system import process_group as groups
import torch

world, cpu = groups.current_world(), torch.device("cpu")
for number in range(4):
    with groups.process_group(world, cpu, needed=True, heartbeat=number % 2 == 0):
        long = "x" * (10 ** world.rank)
        gathered = groups.gather_object((world.rank, long))
        numbers = groups.gather_numbers([world.rank, 0.5])
        first = groups.on_rank_0(lambda: ("of", world.rank))
    assert first == ("of", 0), first
    if world.is_main:
        assert [len(text) for _, text in gathered] == [10 ** rank for rank in range(world.size)], gathered
        assert numbers == [[rank, 0.5] for rank in range(world.size)], numbers
    else:
        assert gathered is None and numbers is None

def refuse():
    raise InUseError("in use")

try:
    with groups.process_group(world, cpu, needed=True):
        groups.on_rank_0(refuse)
except UserError as error:
    print("told", error.status, error, flush=True)
except SystemExit as ended:
    print("silent", ended.code, flush=True)
try:
    with groups.process_group(world, cpu, needed=True):
        raise UserError(f"of rank {world.rank}")
except UserError as error:
    print("own", error, flush=True)
"""


@pytest.mark.parametrize("served", [False, True], ids=["launcher", "rank 0"])
def test_groups_follow_each_other(tmp_path, served):
    """The store is the launcher's, as under torchrun, or that of rank 0, as with srun."""
    if served:
        output = "".join(start([0, 1, 2], 3, PROGRAM))
    else:
        (tmp_path / "program.py").write_text(PROGRAM)
        status, output = launch(3, module=str(tmp_path / "program.py"), timeout=600)
        assert status == 0, output
    lines = [line for line in output.splitlines() if line.startswith(("told", "silent", "own"))]
    assert sorted(lines) == [*(f"own of rank {rank}" for rank in range(3)), "silent 75", "silent 75", "told 75 in use"]
    assert "Traceback" not in output
    assert not dist.is_initialized()
