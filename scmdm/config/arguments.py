"""Commands as data: positional arguments, options and a configuration, and the parser made from them.

A command's function lives in the package that does the work and is imported when the command runs, so that
`scmdm --help` needs no torch. It is called with the positional arguments, the configuration (if the command has one),
and the options by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, get_args, get_type_hints

from scmdm.config.fields import Key, PathKind, describe_keys, require, rules_of, section_of
from scmdm.config.loading import load_config
from scmdm.config.shipped import open_input
from scmdm.errors import UserError
from scmdm.system.terminal import printable

REQUIRED = object()  # default of an argument that must be given


@dataclass(frozen=True)
class Argument:
    """A positional argument, or an option if the name begins with dashes."""

    name: str
    rules: Key
    kind: type = str  # bool: a flag, False unless it is given
    default: Any = REQUIRED
    repeatable: bool = False

    @property
    def is_option(self) -> bool:
        """Return whether the name begins with dashes."""
        return self.name.startswith("--")

    @property
    def attribute(self) -> str:
        """Name of the value among the parsed arguments."""
        return self.name.removeprefix("--").replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare the argument in an argparse parser."""
        if self.kind is bool:
            parser.add_argument(self.name, action="store_true", help=self.rules.help)
            return
        # An empty path would become the working directory before it is checked.
        kind = str if self.kind is Path else self.kind
        settings: dict[str, Any] = {"type": kind, "help": self.rules.help}
        if self.rules.choices:
            settings["choices"] = self.rules.choices
        if self.repeatable:
            settings |= {"default": []} | ({"action": "append"} if self.is_option else {"nargs": "*"})
        elif self.default is not REQUIRED:
            settings |= {"default": self.default} | ({} if self.is_option else {"nargs": "?"})
            settings["help"] += f" (default: {self.default})" if self.default is not None else ""
        if self.is_option and not self.rules.choices:
            settings["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(self.kind, "TEXT")
        parser.add_argument(self.name, **settings)

    def checked(self, value: Any) -> Any:
        """Return the value, a path located. Raises UserError for a value out of bounds."""
        for one in value if isinstance(value, list) else [value]:
            given = str(one) if isinstance(one, Path) else one
            require(one is None or self.rules.allows(given), self.name, one, self.rules.wanted(given))
            if not self.is_option and str(one).startswith(f"{self.name}="):
                raise UserError(f"{one} is not possible; {self.name} is given by its place: leave out {self.name}=")
        if self.rules.path is PathKind.INPUT and value is not None:
            value = open_input(self.name, Path(value)) if self.kind is Path else str(open_input(self.name, Path(value)))
        return Path(value) if self.kind is Path and value is not None else value


def argument(
    name: str, help: str, kind: type = str, default: Any = REQUIRED, *, repeatable: bool = False, **rules: Any
) -> Argument:
    """Declare an argument; `rules` are fields of `scmdm.config.fields.Key`. By default, a path is an input."""
    if kind is Path:
        rules = {"path": PathKind.INPUT, **rules}
    return Argument(name, Key(help, **rules), kind, default, repeatable)


@dataclass(frozen=True)
class Command:
    """A command of `scmdm`. Function and schema are given as `module:name`, the module relative to `scmdm`."""

    name: str  # two words for an action of a group, as in `checkpoint list`
    summary: str
    function: str
    arguments: tuple[Argument, ...] = ()
    schema: str | None = None  # dataclass of the configuration, which a YAML file (`config`) and key=value set
    options: tuple[Argument, ...] = ()
    option_groups: dict[str, type] = field(default_factory=dict)  # dataclasses whose keys are options, by parameter
    overrides: bool = False  # accepts key=value without a schema
    is_default: bool = False  # the action of its group when none is given; it has no arguments

    def all_arguments(self) -> Iterator[Argument]:
        """Yield positional arguments, options, and the options of groups."""
        yield from self.arguments
        yield from self.options
        for group in self.option_groups.values():
            yield from _options_of(group)

    def load_schema(self) -> type:
        """Import the dataclass of the configuration."""
        assert self.schema is not None
        schema: type = _import_object(self.schema)
        return schema


class _Parser(argparse.ArgumentParser):
    """Parser whose help ends with the keys of the command's configuration, imported only then."""

    command: Command | None = None

    def format_help(self) -> str:
        text = super().format_help()
        if self.command is None or self.command.schema is None:
            return text
        return f"{text}\nkeys, in the YAML file or as key=value:\n{describe_keys(self.command.load_schema())}\n"

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: ") and re.search(r" [^-\s][^\s=]*=", message):
            message += "; give key=value before the options that begin with --"
        self.exit(2, f"scmdm: error: {printable(message)}; see `{self.prog} --help`\n")


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def make_parser(program: str, commands: Sequence[Command], description: str, epilog: str) -> argparse.ArgumentParser:
    """Make an argparse parser of all commands, whose result is the argument of `run_command`."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=program, description=description, epilog=epilog, formatter_class=layout)
    top = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups: dict[str, _Commands] = {}
    for command in commands:
        group, _, name = command.name.rpartition(" ")
        if group and group not in groups:
            names = ", ".join(other.name for other in commands if other.name.startswith(f"{group} "))
            subparser = top.add_parser(group, help=f"Group of commands: {names}.")
            default = next((one for one in commands if one.is_default and one.name.startswith(f"{group} ")), None)
            subparser.set_defaults(command=default)
            groups[group] = subparser.add_subparsers(required=default is None, metavar="ACTION")
        _add(groups[group] if group else top, name, command)
    return parser


def _add(commands: _Commands, name: str, command: Command) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=command.summary, description=command.summary, formatter_class=layout)
    parser.command = command
    parser.set_defaults(command=command)
    for declared in command.all_arguments():
        declared.add_to(parser)
    if command.schema is not None or command.overrides:
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key, as in optimizer.lr=3e-4")


def run_command(options: argparse.Namespace) -> None:
    """Check the arguments, load the configuration, and call the command's function.

    Raises UserError for a value out of bounds and for mistakes in the configuration.
    """
    values = dict(vars(options))
    command: Command = values.pop("command")
    for declared in command.all_arguments():
        values[declared.attribute] = declared.checked(values[declared.attribute])
    positional = [values.pop(declared.attribute) for declared in command.arguments]
    if command.schema is not None:
        values, positional = _with_config(command, values, positional)
    groups = {name: _build_group(group, values) for name, group in command.option_groups.items()}
    _import_object(command.function)(*positional, **values, **groups)


def _with_config(command: Command, values: dict[str, Any], positional: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Load the YAML file and the overrides, and append the configuration to the positional arguments.

    It is None when neither was given to a command whose configuration is optional.
    """
    overrides: list[str] = values.pop("overrides")
    path, needed = values.pop("config", None), True
    for index, declared in enumerate(command.arguments):
        if declared.attribute == "config":
            path, needed = positional.pop(index), declared.default is REQUIRED
    missing = path is None and not overrides and not needed
    config = None if missing else load_config(command.load_schema(), path, overrides)
    return values, [*positional, config]


def _import_object(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"scmdm.{module}"), attribute)


def _options_of(group: type, prefix: str = "--") -> Iterator[Argument]:
    """Yield an option per key: `--start-timeout` for `start_timeout`, `--no-x` for a flag `x` that defaults to true."""
    hints = get_type_hints(group)
    for declared in dataclasses.fields(group):
        rules, section, hint = rules_of(declared), section_of(declared), hints[declared.name]
        name = f"{prefix}{declared.name.replace('_', '-')}"
        if section is not None:
            yield from _options_of(section, f"{name}-")
            continue
        assert rules is not None
        kinds = [kind for kind in get_args(hint) if kind not in (type(None), Ellipsis)] or [hint]
        if declared.default is True:
            name = f"--no-{name.removeprefix('--')}"
        yield Argument(name, rules, kinds[0], declared.default, repeatable=declared.default == ())


def _build_group(group: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Build an instance of a dataclass from its options, which are removed from `values`."""
    found: dict[str, Any] = {}
    for declared in dataclasses.fields(group):
        name, section = f"{prefix}{declared.name}", section_of(declared)
        if section is not None:
            found[declared.name] = _build_group(section, values, f"{name}_")
        elif declared.default is True:
            found[declared.name] = not values.pop(f"no_{name}")
        else:
            value = values.pop(name)
            found[declared.name] = tuple(value) if declared.default == () else value
    return group(**found)
