"""MkDocs hook: add the pages that are generated from the command line, the configuration schemas and the root files."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from scmdm.cli import COMMANDS
from scmdm.config.arguments import Command, make_parser
from scmdm.config.fields import Key, rules_of, section_of
from scmdm.domains.domain_registry import DOMAINS

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    files.append(File.generated(config, "reference/configuration.md", content=configuration_page()))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text().replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def parsers() -> Iterator[tuple[Command, argparse.ArgumentParser]]:
    """All commands with their parsers."""
    yield from _parsers(make_parser("scmdm", COMMANDS, "", ""))


def _parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[Command, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)
    command = getattr(parser, "command", None)
    if command is not None:
        yield command, parser


def cli_page() -> str:
    """Markdown of the command line's reference."""
    lines = [
        "# Command line",
        "",
        "Generated from the parser. The configuration keys of each command are on their",
        "[own page](configuration.md), and at the end of `scmdm COMMAND --help`.",
        "",
    ]
    for command, parser in parsers():
        # The base class's help has no configuration keys, which follow on their own page.
        text = argparse.ArgumentParser.format_help(parser).rstrip()
        lines += [f"## scmdm {command.name}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def configuration_page() -> str:
    """Markdown of all configuration keys, with commands of the same configuration together."""
    lines = [
        "# Configuration keys",
        "",
        "Generated from the schemas. A key is set in the YAML file or as `key=value` on the command line.",
        "*Resume* marks keys that may change when a run is resumed; *adapt* says what an adaptation may do with a key",
        "of its base's model.",
        "",
    ]
    by_schema: dict[str, list[Command]] = {}
    shown: list[type] = []
    for command in COMMANDS:
        if command.schema is not None:
            by_schema.setdefault(command.schema, []).append(command)
    for commands in by_schema.values():
        title = " and ".join(command.name for command in commands)
        schema = commands[0].load_schema()
        lines += [f"## {title}", ""]
        if issubclass(schema, tuple(shown)):
            lines += ["All keys of `train`, none of which is required.", ""]
        else:
            lines += [*_tables(schema, ""), ""]
        shown.append(schema)
    lines += ["## metrics", "", "Keys of the section `metrics` of `evaluate` and `study`, by domain.", ""]
    for name in DOMAINS.names:
        schema = DOMAINS.schema(name)
        if dataclasses.fields(schema):
            lines += [f"### {name}", "", *_tables(schema, "metrics.", 4), ""]
    return "\n".join(lines)


def _tables(schema: type, prefix: str, depth: int = 3, selector: str = "") -> Iterator[str]:
    """A table of the schema's own keys except for `selector`, then those of its sections."""
    hints = typing.get_type_hints(schema)
    own: list[list[str]] = []
    sections: list[tuple[str, type, str]] = []
    for field in dataclasses.fields(schema):
        if f"{prefix}{field.name}" == selector:
            continue
        rules = rules_of(field)
        element = section_of(field) or _element(hints[field.name])
        if rules is not None and rules.registry is not None:
            inner = f"{prefix}{field.name}."
            selected = getattr(section_of(field), rules.selector, "required")
            default = selected if selected in ("required", "???") else f"`{selected}`"
            values = f"one of {', '.join(rules.registry.names)}"
            own.append([f"`{inner}{rules.selector}`", default.replace("???", "required"), values, rules.help, "", ""])
            sections += [
                (inner, rules.registry.schema(name), f"`{inner}{rules.selector}={name}`")
                for name in rules.registry.names
            ]
        elif dataclasses.is_dataclass(element):
            named = _is_mapping(hints[field.name])
            inner = f"{prefix}{field.name}.NAME." if named else f"{prefix}{field.name}."
            sections.append((inner, element, f"`{inner.rstrip('.')}`"))
        else:
            own.append(_row(prefix, field, rules, hints[field.name]))
    if own:
        titles = ("key", "default", "values", "meaning", "resume", "adapt")
        # Columns without any content are left out.
        kept = [column for column in range(len(titles)) if column < 4 or any(row[column] for row in own)]
        rows = [[row[column] for column in kept] for row in (titles, ["---"] * len(titles), *own)]
        yield from (f"| {' | '.join(cells)} |" for cells in rows)
        yield ""
    for inner, section, title in sections:
        lines = list(_tables(section, inner, depth + 1, selector=title.partition("=")[0].strip("`")))
        yield from (f"{'#' * depth} {title}", "", *(lines or ["No other keys.", ""]))


def _row(prefix: str, field: dataclasses.Field[Any], rules: Key | None, hint: Any) -> list[str]:
    default: object = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    shown = {
        "???": "required",
        str(dataclasses.MISSING): "required",
        "None": "null",
        "True": "true",
        "False": "false",
    }.get(str(default), str(default))
    values = rules.wanted() if rules is not None else ""
    if values in ("", "a finite number"):
        values = _type_name(hint)
    cells = (
        f"`{prefix}{field.name}`",
        shown if shown in ("required", "") else f"`{shown}`",
        values,
        rules.help if rules is not None else "",
        "yes" if rules is not None and rules.on_resume else "",
        rules.on_adapt.value if rules is not None and prefix.startswith("model.") else "",
    )
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def _element(hint: Any) -> Any:
    """The dataclass inside an optional or a mapping, else the type itself."""
    arguments = [argument for argument in typing.get_args(hint) if dataclasses.is_dataclass(argument)]
    return arguments[-1] if arguments else hint


def _is_mapping(hint: Any) -> bool:
    return any(typing.get_origin(part) is dict for part in (hint, *typing.get_args(hint)))


def _type_name(hint: Any) -> str:
    name = hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint)
    for old, new in (("typing.", ""), ("pathlib.", ""), (" | None", " or null"), ("NoneType", "null")):
        name = name.replace(old, new)
    return name
