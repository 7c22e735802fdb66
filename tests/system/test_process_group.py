"""Process groups of one process."""

from datetime import timedelta

import torch
import torch.distributed as dist

from scmdm.system.process_group import World, process_group


def timeout_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def test_groups_of_a_run_have_its_timeout():
    """Those of a mesh and of saves, too: with torch's shorter default, a slow save or step would count as a hang."""
    wanted, found = timedelta(minutes=77), []
    for timeout in (None, wanted, None):
        with process_group(World(0, 1, 0), torch.device("cpu"), needed=True, timeout=timeout):
            found.append(timeout_of(dist.new_group(backend="gloo")))
    assert found[1] == wanted and found[0] == found[2] != wanted
