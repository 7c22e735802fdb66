"""What only rank 0 reads or writes: when it fails, every rank raises the error instead of waiting in a collective."""

import pytest

from tests.distributed.test_missing_rank import start

pytestmark = pytest.mark.slow

PROGRAM = """
from pathlib import Path
import torch
from scmdm.errors import UserError
from scmdm.runtime.divided_work import ResultParts, compute_divided
from scmdm.system.process_group import current_world, process_group
try:
    with process_group(current_world(), torch.device("cpu"), needed=True):
        try:
            compute_divided(4, lambda numbers: [], ResultParts(Path(PLACE), {}))
        except (UserError, OSError) as error:
            print(type(error).__name__, error)
except SystemExit:
    pass
"""


def damage_a_part(place):
    from scmdm.runtime.divided_work import ResultParts

    (place / f"{ResultParts(place, {}).prefix}-000000000.npz").write_bytes(b"damaged")


def block_the_stacks(place):
    (place / "stacks").mkdir()
    (place / "stacks/rank_0.txt").write_text("=== ")
    (place / "stacks.before").touch()


@pytest.mark.parametrize(("damage", "named"), [(damage_a_part, "000000000.npz"), (block_the_stacks, "stacks.before")])
def test_every_rank_raises_what_rank_0_raises(tmp_path, damage, named):
    damage(tmp_path)
    for output in start([0, 1, 2], 3, PROGRAM.replace("PLACE", repr(str(tmp_path)))):
        assert named in output and "Traceback" not in output, output
