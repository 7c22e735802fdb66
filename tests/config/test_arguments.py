"""The table of commands: functions that take what the table says, and options that are checked."""

import importlib
import inspect
import os
from pathlib import Path

import pytest

from scmdm.cli import COMMANDS, build_parser, main
from scmdm.config.fields import PathKind
from scmdm.config.loading import load_config
from scmdm.config.run import RunConfig
from scmdm.config.sampling import SampleConfig
from scmdm.errors import UserError

IDS = [command.name.replace(" ", "-") for command in COMMANDS]


def names(arguments):
    return [argument.attribute for argument in arguments]


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_the_function_takes_what_the_table_says(command):
    module, _, name = command.function.partition(":")
    signature = inspect.signature(getattr(importlib.import_module(f"scmdm.{module}"), name))
    positional = [name for name in names(command.arguments) if name != "config" or command.schema is None]
    options = [name for name in names(command.options) if name != "config" or command.schema is None]
    if command.schema is not None:
        positional.append("config")
    if command.overrides:
        options.append("overrides")
    signature.bind(*positional, **dict.fromkeys([*options, *command.option_groups]))


def test_names_are_given_once():
    assert len(set(IDS)) == len(IDS)
    for command in COMMANDS:
        found = names(command.all_arguments())
        assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        pytest.param(command, option, value, id=f"{command.name}{option.name}={value}")
        for command in COMMANDS
        for option in command.all_arguments()
        if option.kind in (int, float)
        for value in ("-1", str(2**63), str(10**30), *(("nan", "inf", "1e999") if option.kind is float else ()))
    ],
)
def test_a_number_out_of_bounds_is_refused(command, option, value, capsys):
    given = ["x"] * len(command.arguments)
    assert main([*command.name.split(), *given, f"{option.name}={value}"]) == 1
    error = capsys.readouterr().err
    assert f"{option.name}=" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "option"),
    [
        pytest.param(command, option, id=f"{command.name} {option.name}")
        for command in COMMANDS
        for option in command.all_arguments()
        if option.kind is Path
    ],
)
@pytest.mark.parametrize("path", ["", " ", "a\nb", "a\0b", "\x1b[31m", "\udcff", "x" * 5000])
def test_what_cannot_be_a_path_is_refused(command, option, path, capsys):
    given = [path if declared is option else "x" for declared in command.arguments]
    options = [f"{option.name}={path}"] if option.is_option else []
    assert main([*command.name.split(), *given, *options]) == 1
    error = capsys.readouterr().err
    assert f"{option.name}=" in error and error.count("\n") == 1 and error[:-1].isprintable()


@pytest.mark.parametrize(
    "arguments", ["", "none", "sample", f"plan x --nodes {'9' * 5000}", "demo x --x", "demo --port x"]
)
def test_a_malformed_command_line_ends_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "option"),
    [
        pytest.param(command, option, id=f"{command.name} {option.name}")
        for command in COMMANDS
        for option in command.all_arguments()
        if option.rules.path is PathKind.INPUT
    ],
)
def test_an_input_that_never_ends_is_refused(command, option, tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        given = [str(path) if declared is option else "x" for declared in command.arguments]
        assert main([*command.name.split(), *given, *([f"{option.name}={path}"] if option.is_option else [])]) == 1
        error = capsys.readouterr().err
        assert f"{option.name}={path}" in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["export", "run", "out=there"], ["export", "run=run", "there"]])
def test_an_argument_by_place_is_no_key(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    found = next(given for given in arguments if "=" in given)
    assert found in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_key_that_names_an_input_that_never_ends_is_refused():
    with pytest.raises(UserError, match=r"prompts=/dev/zero"):
        load_config(SampleConfig, None, ["prompts=/dev/zero"])
    keys = ["run_dir=r", "train.steps=9", "data.streams.a.path=/dev/zero", "data.streams.a.proportion=1"]
    with pytest.raises(UserError, match=r"streams\.a\.path=/dev/zero"):
        load_config(RunConfig, None, keys)


def test_options_of_a_dataclass_are_its_values():
    given = ["--container-mount", "a:b", "--no-requeue", "--start-timeout", "7"]
    options = build_parser().parse_args(["launch", "slurm", "adapt", "x.yaml", "seed=1", *given])
    assert (options.container_mount, options.no_requeue, options.start_timeout) == (["a:b"], True, 7)
    assert options.overrides == ["seed=1"] and options.ranks_per_node is None
