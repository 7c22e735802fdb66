"""The table of commands: functions that take what the table says, and options that are checked."""

import importlib
import inspect

import pytest

from scmdm.cli import COMMANDS, build_parser, main

IDS = [command.name.replace(" ", "-") for command in COMMANDS]


def names(arguments):
    return [argument.attribute for argument in arguments]


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_the_function_takes_what_the_table_says(command):
    module, _, name = command.function.partition(":")
    signature = inspect.signature(getattr(importlib.import_module(f"scmdm.{module}"), name))
    positional = [name for name in names(command.arguments) if name != "config" or command.schema is None]
    options = [name for name in names(command.options) if name != "config"]
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
        for value in ("-1", str(10**30), *(("nan", "inf") if option.kind is float else ()))
    ],
)
def test_a_number_out_of_bounds_is_refused(command, option, value, capsys):
    given = ["x"] * len(command.arguments)
    assert main([*command.name.split(), *given, f"{option.name}={value}"]) == 1
    error = capsys.readouterr().err
    assert f"{option.name}=" in error and error.count("\n") == 1


def test_options_of_a_dataclass_are_its_values():
    given = ["--container-mount", "a:b", "--no-requeue", "--start-timeout", "7"]
    options = build_parser().parse_args(["launch", "slurm", "adapt", "x.yaml", "seed=1", *given])
    assert (options.container_mount, options.no_requeue, options.start_timeout) == (["a:b"], True, 7)
    assert options.overrides == ["seed=1"] and options.ranks_per_node is None
