"""What comes from names and files is shown as it is: nothing is lost, interpreted or raised."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.logging import RichHandler
from rich.table import Table

import scmdm.cli
from scmdm.cli import main
from scmdm.observability.run_metrics import log_to
from scmdm.system.terminal import Terminal, printable
from tests.conftest import ROOT

HOSTILE = "a[/red]b [bold]c :smile: \x1b[31md\x9be\ufefff\u202eg"


def test_only_one_module_uses_richs_console():
    users = [path.name for path in (ROOT / "scmdm").rglob("*.py") if "rich.console" in path.read_text()]
    assert users == ["terminal.py"]


def shown(text, encoding="utf-8"):
    """What a table and a line print on a terminal of this encoding."""
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding, errors="backslashreplace")
    console = Terminal(file=file, width=400, force_terminal=False)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    console.print(text, soft_wrap=True)
    file.flush()
    return buffer.getvalue().decode(encoding)


def test_markup_is_text_and_control_characters_are_escapes():
    found = shown(HOSTILE)
    assert found.count("a[/red]b [bold]c :smile: \\x1b[31md\\x9be") == 4 and "\x1b" not in found


@given(st.text(max_size=20), st.sampled_from(["utf-8", "ascii", "latin-1"]))
def test_any_text_is_shown(text, encoding):
    found = shown(text, encoding)
    assert not {letter for letter in found if ord(letter) < 32 and letter not in "\n\t"}


@given(st.text(st.characters(), max_size=20))
def test_one_line(text):
    line = printable(text)
    assert line.encode() is not None and len(line.splitlines()) <= 1


def test_log_lines(tmp_path, monkeypatch, capsys):
    with log_to(tmp_path):
        logging.getLogger("scmdm").warning("read %s", HOSTILE)
    written = (tmp_path / "train.log").read_text() + capsys.readouterr().out
    assert written.count("a[/red]b [bold]c :smile: \\x1b[31md") == 2 and "\x1b" not in written
    monkeypatch.setattr(Terminal, "is_terminal", True)
    with log_to(tmp_path):
        kinds = {type(handler) for handler in logging.getLogger("scmdm").handlers}
        logging.getLogger("scmdm").warning("read %s", HOSTILE)
    assert RichHandler in kinds and "\x1b[31md" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"LANG": "C", "TERM": "dumb"}])
def test_a_result_is_not_lost_for_a_name(base, molecules, tmp_path, environment):
    """An evaluation of a model, of which name and place are hostile, on a terminal without letters."""
    model = tmp_path / "a[/red]b [bold] é"
    shutil.copytree(base, model)
    out = tmp_path / "[/x].json"
    keys = [f"data={molecules}", "split=validation", "num=8", "nelbo_samples=8", "sampler.steps=2", f"out={out}"]
    command = [sys.executable, "-m", "scmdm", "evaluate", str(model), *keys, "device=cpu"]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "400", **environment}, capture_output=True)
    assert done.returncode == 0 and not done.stderr.count(b"Traceback"), done.stderr
    assert json.loads(out.read_text())["samples"] and b"[/red]b" in done.stdout


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
        (OSError(28, "No space left on device", "x"), 1),
    ],
)
def test_what_is_no_bug_ends_in_one_line(monkeypatch, capsys, error, status):
    monkeypatch.setattr(scmdm.cli, "run_command", lambda options: (_ for _ in ()).throw(error))
    assert main(["configs"]) == status
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("k"), AssertionError()])
def test_a_bug_ends_in_a_traceback(monkeypatch, error):
    monkeypatch.setattr(scmdm.cli, "run_command", lambda options: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        main(["configs"])


@pytest.mark.parametrize(("output", "status"), [("/dev/full", 1), ("pipe", 141)])
def test_output_that_cannot_be_written(output, status):
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full" if output == "/dev/full" else writing, "w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "scmdm", "configs"], stdout=file, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == status and done.stderr.count("\n") == 1
