"""Every key of every configuration class: a value that it cannot have ends in one line."""

import contextlib
import dataclasses
import math
import re
from typing import get_args, get_origin, get_type_hints

import pytest
from omegaconf import MISSING

from scmdm.cli import COMMANDS
from scmdm.config.fields import rules_of, section_of
from scmdm.config.loading import flatten, load_config, read_config
from scmdm.errors import UserError


def sections(schema):
    """The class, and those of its sections, of mappings to sections, and of all names of its registries."""
    yield schema
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        rules, section = rules_of(field), section_of(field)
        if rules is not None and rules.registry is not None:
            for name in rules.registry.names:
                yield from sections(rules.registry.schema(name))
        elif section is not None:
            yield from sections(section)
        for element in get_args(hints[field.name]):
            if dataclasses.is_dataclass(element):
                yield from sections(element)


COMMANDS_WITH_KEYS = [command for command in COMMANDS if command.schema is not None]
SECTIONS = dict.fromkeys(section for command in COMMANDS_WITH_KEYS for section in sections(command.load_schema()))
KEYS = [
    pytest.param(section, field.name, get_type_hints(section)[field.name], id=f"{section.__name__}.{field.name}")
    for section in SECTIONS
    for field in dataclasses.fields(section)
    if section_of(field) is None and (rules_of(field) is None or rules_of(field).registry is None)
]


def is_numeric(hint):
    return hint is not bool and bool({int, float} & {hint, *get_args(hint)})


NUMBERS = [parameter for parameter in KEYS if is_numeric(parameter.values[2])]


def required(section):
    """Something for each key that must be set."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        found = rules_of(field)
        if found is not None and found.registry is not None:
            name = found.registry.names[0]
            yield field.name, {**dict(required(found.registry.schema(name))), found.selector: name}
        elif field.default in (MISSING, dataclasses.MISSING) and field.default_factory is dataclasses.MISSING:
            yield field.name, "x" if hints[field.name] is str else found.at_least or 1
        elif inner := section_of(field):
            yield field.name, dict(required(inner))


def load(section, name, value):
    return read_config(section, {**dict(required(section)), name: value}, "in the test")


def rules(section, name):
    (found,) = (rules_of(field) for field in dataclasses.fields(section) if field.name == name)
    return found


@pytest.mark.parametrize(("section", "name", "hint"), KEYS)
def test_every_key_is_declared_with_a_help_text(section, name, hint):
    assert rules(section, name).help


@pytest.mark.parametrize(("section", "name", "hint"), NUMBERS)
def test_a_numeric_key_has_a_lower_and_an_upper_bound(section, name, hint):
    found = rules(section, name)
    assert {found.at_least, found.above} != {None} and {found.at_most, found.below} != {None}


VALUES = (math.nan, math.inf, -math.inf, -1, 0, 1e30, 10**400)


@pytest.mark.parametrize(("section", "name", "hint"), NUMBERS)
def test_a_number_is_accepted_within_bounds_or_refused_in_one_line(section, name, hint):
    for value in VALUES:
        given = [value] if list in {hint, get_origin(hint)} else value
        if rules(section, name).allows(value):
            with contextlib.suppress(UserError):  # a combination with another key
                load(section, name, given)
            continue
        with pytest.raises(UserError, match=re.escape(name)) as refused:
            load(section, name, given)
        assert "\n" not in str(refused.value)


BEYOND = ["nan", ".nan", "inf", "-.inf", "1e999", "-1", str(2**63), "9" * 5000, "[[]]", f"[{2**63}]"]
ODD = ["", "null", "x", "[a]", "[nan]", "[null]", "{}", "{a: 1}", "${x}", "???", "0x10", "1_0", "true", "[", "'", "\0"]


@pytest.mark.parametrize(("section", "name", "hint"), NUMBERS)
def test_a_text_on_the_command_line_is_a_possible_number_or_refused_in_one_line(section, name, hint):
    needed = [f"{key}={value}" for key, value in flatten(dict(required(section))).items()]
    for text in BEYOND + ODD:
        message = ""
        try:
            found = getattr(load_config(section, None, [*needed, f"{name}={text}"]), name)
        except UserError as error:
            message = str(error)
        assert len(message) < 3000 and "\n" not in message
        assert message or found is None or rules(section, name).allows(found)


@pytest.mark.parametrize(("section", "name", "hint"), KEYS)
def test_a_value_of_any_type_is_accepted_or_refused_in_one_line(section, name, hint):
    """As a YAML file or a request can have it. Anything but a UserError fails the test."""
    for value in (None, [[1]], {"a": {"b": None}}, 10**5000, "${x}"):
        try:
            load(section, name, value)
        except UserError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 3000
