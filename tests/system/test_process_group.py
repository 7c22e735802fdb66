"""Process groups of one process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from scmdm.errors import UserError
from scmdm.system.process_group import World, current_world, process_group


def timeout_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def test_groups_of_a_run_have_its_timeout():
    """Those of a mesh and of saves, too: with torch's shorter default, a slow save or step would count as a hang."""
    wanted, found = timedelta(minutes=77), []
    for timeout in (None, wanted, None):
        with process_group(World(0, 1, 0), torch.device("cpu"), needed=True, timeout=timeout):
            found.append(timeout_of(dist.new_group(backend="gloo")))
    assert found[1] == wanted and found[0] == found[2] != wanted


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ],
)
def test_variables_that_are_not_those_of_a_rank_are_named(monkeypatch, variables, named):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        current_world()
