"""Process groups of one process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from scmdm.errors import UserError
from scmdm.system.process_group import World, current_world, process_group
from scmdm.system.signals import stop_signals


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


@pytest.mark.parametrize("port", ["99999", "-1", "x", ""])
def test_a_port_that_no_machine_has_is_named(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with (
        pytest.raises(UserError, match=f"MASTER_PORT={port} .*65535"),
        process_group(World(1, 2, 1), torch.device("cpu"), needed=True, arrival=timedelta(seconds=1)),
    ):
        pass


@pytest.mark.parametrize("names", ["KILL", "TERM,SIGSTOP", "TERM,FOO"])
def test_signals_that_cannot_be_caught_are_named(monkeypatch, names):
    monkeypatch.setenv("SCMDM_STOP_SIGNALS", names)
    with pytest.raises(UserError, match=f"SCMDM_STOP_SIGNALS={names}"):
        stop_signals()
