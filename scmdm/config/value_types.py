"""Values of configuration keys that have another type than their key, and would be converted without a word."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast, get_args, get_origin, get_type_hints

from scmdm.config.fields import shorten

_EXAMPLES: dict[Any, tuple[str, str]] = {str: ("a", "b"), int: ("1", "2"), float: ("0.1", "0.2")}


@functools.cache
def type_hints(schema: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name."""
    return get_type_hints(schema)


def values_of_other_types(hint: Any, value: Any, name: str, literal: bool) -> Iterator[tuple[str, Any, str]]:
    """Yield the values that OmegaConf would convert to another type or leave out, each with what is allowed."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        for key, child in value.items():
            child_hint = type_hints(cast(Any, hint)).get(key, Any)
            yield from values_of_other_types(child_hint, child, f"{name}.{key}" if name else key, literal)
    elif isinstance(value, dict):
        child_hint = get_args(hint)[1] if get_origin(hint) is dict else Any
        for key, child in value.items():
            yield from values_of_other_types(child_hint, child, f"{name}.{key}", literal)
    elif isinstance(value, list):
        child_hint = get_args(hint)[0] if get_origin(hint) in (list, tuple) else Any
        for index, child in enumerate(value):
            if child_hint in (str, int, float) and isinstance(child, list | dict):
                yield name, value, f"a list of values, as in {name}=[{', '.join(_EXAMPLES[child_hint])}]"
            else:
                yield from values_of_other_types(child_hint, child, f"{name}[{index}]", literal)
    elif (wanted := _wanted_instead(hint, value, name, literal)) is not None:
        yield name, value, wanted


def _wanted_instead(hint: Any, value: Any, name: str, literal: bool) -> str | None:
    """Return what is allowed instead of a scalar; None if it is of the type that `hint` names, or is refused later."""
    if value == "???" and not literal:
        return "a value; leave the key out to keep its default"
    if not literal and isinstance(value, str) and "${" in value:
        return None  # what it stands for is not known yet
    if get_origin(hint) in (list, tuple) and value is not None:
        return f"a list, as in {name}=[{shorten(value)}]"
    kinds = get_args(hint) or (hint,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if bool in kinds and (number or (isinstance(value, str) and value.isdecimal())):
        return "true or false"
    if str in kinds and isinstance(value, int | float):
        return "text; put it in quotes, because YAML reads it as another type"
    return None
