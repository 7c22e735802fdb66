"""The folder of downloaded corpora."""

import subprocess
import sys
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


_MAKE_SLOWLY = """
import sys, time
from scmdm.system.package_data import cached_folder

def make(folder):
    with open(sys.argv[1], "a") as log:
        log.write("made\\n")
    time.sleep(1)
    (folder / "file").write_text("whole")

print("ready", flush=True)
sys.stdin.readline()
print((cached_folder("corpus", make) / "file").read_text())
"""


def test_two_processes_download_once(tmp_path, monkeypatch):
    """As slices of one preparation do on machines with a shared home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-c", _MAKE_SLOWLY, str(tmp_path / "log")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        assert first.stdout.readline() == second.stdout.readline() == "ready\n"
        for process in (first, second):
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in (first, second):
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, output) == (0, "whole\n"), errors
    assert (tmp_path / "log").read_text() == "made\n"
