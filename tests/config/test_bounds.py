"""Every numeric key of every command: a value out of bounds ends in one line."""

import contextlib
import dataclasses
import re
from typing import get_args, get_origin, get_type_hints

import pytest

from scmdm.cli import COMMANDS
from scmdm.config.fields import rules_of, section_of
from scmdm.config.loading import load_config
from scmdm.errors import UserError
from tests.conftest import ROOT

# What a user must give, by command: with it alone, loading succeeds.
REQUIRED = {
    "prepare": ["out=o", "source=qm9", "tokenizer=smiles", "length=32"],
    "train": ["run_dir=r", "data.path=d", "train.steps=10"],
}
REQUIRED["adapt"] = [*REQUIRED["train"], "base=b"]
STREAM = ["data.path=null", "data.streams.x.path=p"]
FILES = {"study": ROOT / "configs/qm9/quickstart.yaml"}


def numeric_keys(schema, prefix=""):
    """Dotted name, rules and type (int, float, list) of every key that holds numbers."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, rules, section, hint = f"{prefix}{field.name}", rules_of(field), section_of(field), hints[field.name]
        if rules is not None and rules.registry is not None:
            for selected in rules.registry.names:
                for key, *rest in numeric_keys(rules.registry.schema(selected), f"{name}."):
                    yield key, *rest, f"{name}.{rules.selector}={selected}"
        elif section is not None:
            yield from numeric_keys(section, f"{name}.")
        elif hint is not bool and {int, float} & {hint, *get_args(hint)}:
            yield name, rules, hint
        for element in get_args(hint):
            if dataclasses.is_dataclass(element):
                yield from numeric_keys(element, f"{name}.x.")


SCHEMAS = [command for command in COMMANDS if command.schema is not None]
KEYS = [
    pytest.param(command, *found, id=f"{command.name}:{found[0]}")
    for command in SCHEMAS
    for found in ((*key, None)[:4] for key in numeric_keys(command.load_schema()))
    if found[1] is not None or command.name != "prepare"
]


def load(command, *overrides):
    return load_config(command.load_schema(), FILES.get(command.name), [*REQUIRED.get(command.name, []), *overrides])


@pytest.mark.parametrize("command", SCHEMAS, ids=lambda command: command.name)
def test_what_must_be_given_is_enough(command):
    assert load(command)


@pytest.mark.parametrize(("command", "name", "rules", "hint", "selection"), KEYS)
def test_a_number_is_accepted_within_bounds_or_refused_in_one_line(command, name, rules, hint, selection):
    around = [selection] if selection else STREAM if ".streams.x." in name else []
    for value in ("nan", "inf", "-inf", "-1", "0", "1e30", "-1e30", str(10**30)):
        text = f"[{value}]" if list in {hint, get_origin(hint)} else value
        if rules.allows(float(value)):
            with contextlib.suppress(UserError):  # a combination with another key
                load(command, *around, f"{name}={text}")
            continue
        with pytest.raises(UserError, match=re.escape(name)) as refused:
            load(command, *around, f"{name}={text}")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("command", "name", "rules", "hint", "selection"), KEYS)
def test_a_numeric_key_has_a_lower_and_an_upper_bound(command, name, rules, hint, selection):
    assert {rules.at_least, rules.above} != {None} and {rules.at_most, rules.below} != {None}
