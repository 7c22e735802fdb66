"""The folder of downloaded corpora."""

from pathlib import Path

import pytest

from scmdm.system.package_data import user_cache


@pytest.mark.parametrize("value", ["", None])
def test_without_a_cache_of_the_user_it_is_in_the_home_directory(monkeypatch, value):
    """An empty variable counts as unset: a relative folder would differ between working directories."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert user_cache("a") == Path.home() / ".cache/scmdm/a"
