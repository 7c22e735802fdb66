"""Memory that is left: of the machine, or of the smallest limit of a control group."""

import pytest

from scmdm.system import memory

MIB = 2**20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Files as the kernel has them for a process in /job/step, where the job has a limit."""
    (tmp_path / "own").write_text("0::/job/step\n")
    (tmp_path / "groups/job/step").mkdir(parents=True)
    for name, limit in (("job/step", "max"), ("job", str(100 * MIB))):
        place = tmp_path / "groups" / name
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{70 * MIB}\n")
        (place / "memory.stat").write_text(f"anon {30 * MIB}\ninactive_file {25 * MIB}\nactive_file 1\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    return tmp_path / "groups"


def test_a_limit_of_a_group_counts_with_the_cache_that_can_be_reclaimed(groups):
    assert memory.available_bytes() == 55 * MIB
    (groups / "job/step/memory.max").write_text(str(10 * MIB))
    assert memory.available_bytes() == 0, "the limit of the inner group is exceeded"


@pytest.mark.parametrize("content", ["max", "", "many"])
def test_without_a_limit_the_machine_counts(groups, content):
    (groups / "job/memory.max").write_text(content)
    assert memory.available_bytes() > 100 * MIB
