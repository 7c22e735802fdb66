"""Load a configuration from a YAML file and `key=value` overrides into a checked dataclass."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from scmdm.config.fields import Key, PathKind, is_path, replaced_keys, rules_of, shorten, validate_keys
from scmdm.config.presets import Preset
from scmdm.config.shipped import explain_missing, locate, open_input, shipped_names
from scmdm.config.value_types import type_hints, values_of_other_types
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text
from scmdm.system.untrusted import describe, parse_yaml, read_yaml

Schema = TypeVar("Schema")
_DECLARED = "_declared_schema"  # attribute of a class that `_with_sections` made
_LONGEST_CHAIN = 32  # files that extend one another
_MOST_TRIED = 500  # keys that are merged one by one to find the refused one
# OmegaConf reads `${` as an interpolation, which no escape reliably prevents, and `???` as a value that is not set.
# In literal text a noncharacter and a letter stand for them until OmegaConf is done.
_MARK = "\ufdd0"
_MARKS = {"${": f"{_MARK}i", "???": f"{_MARK}u", _MARK: f"{_MARK}m"}
_READ_BY_OMEGACONF = re.compile(rf"\$\{{|^\?\?\?$|{_MARK}")
_MARKED = re.compile(f"{_MARK}[ium]")


def load_config(schema: type[Schema], path: Path | None, overrides: Sequence[str] = ()) -> Schema:
    """Merge defaults < YAML file < overrides into an instance of the dataclass `schema`.

    A YAML file may name a parent with `extends: other.yaml` (relative to itself, or the name of a shipped one); its
    own keys win. OmegaConf resolves `${...}` in these files; elsewhere, also on the command line, text is literal.

    Raises UserError for a missing or malformed file, an unknown key (with the nearest valid name), a value of the
    wrong type or out of bounds, a renamed key, or a mandatory key that is not set. If `schema` has a method
    `validate`, it is called last and may raise UserError for impossible combinations.
    """
    layers = [(f"in {file}", content) for file, content in _read_chain(path)] if path is not None else []
    return _merged(schema, layers, overrides, "on the command line", literal=False)


def with_overrides(config: Schema, overrides: Sequence[str], where: str) -> Schema:
    """Apply `key=value` overrides to a configuration. Errors are those of `load_config`; they contain `where`."""
    content = dataclasses.asdict(cast(Any, config))
    return _merged(type(config), [("in the configuration", content)], overrides, where)


def _merged(
    schema: type[Schema], layers: list[tuple[str, Any]], overrides: Sequence[str], where: str, *, literal: bool = True
) -> Schema:
    """Merge layers and overrides; unless `literal`, OmegaConf interpolates the strings of the layers."""
    declared, schema = schema, _choose_sections(schema, [content for _, content in layers], overrides)
    config = copy.deepcopy(_defaults(cast(type, schema)))
    given = [_parse_override(override, schema) for override in overrides]
    for name, value in _preset_values(schema, [*(content for _, content in layers), *given]):
        _merge(config, _nest(name, value), "in the preset")
    for place, content in _drop_deselected_keys(declared, schema, layers):
        _merge(config, content, place, literal=literal)
    for content in given:
        _merge(config, content, where)
    return _checked(schema, config)


def _preset_values(schema: type, contents: Sequence[dict[str, Any]]) -> Iterator[tuple[str, object]]:
    """Yield keys and values of the last preset that is given, for a schema with presets.

    The schema's attribute `presets` maps keys, dotted, to presets by name.
    """
    presets: dict[str, dict[str, Preset]] = getattr(schema, "presets", {})
    for key, known in presets.items():
        names = [value for content in contents for _, value in _values_of([key], content)]
        if names and isinstance(names[-1], str) and names[-1] in known:
            yield from known[names[-1]].values.items()


@functools.cache  # OmegaConf copies faster than it reads a dataclass
def _defaults(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def _choose_sections(schema: type[Schema], layers: Sequence[dict[str, Any]], overrides: Sequence[str]) -> type[Schema]:
    """Return `schema` with the class of each registry section chosen by the last name given for it."""
    assert dataclasses.is_dataclass(schema)
    chosen: list[tuple[str, type]] = []
    for field in dataclasses.fields(schema):
        rules = rules_of(field)
        if rules is None or rules.registry is None:
            continue
        sections = [layer[field.name] for layer in layers if field.name in layer]
        sections += list(_sections_of(field.name, rules.selector, overrides))
        for section in sections:
            if not isinstance(section, dict):
                raise UserError(
                    f"{field.name}={section!r} is not possible; it must be a section: "
                    f"{field.name}: {{{rules.selector}: {section}, ...}}, or {field.name}.{rules.selector}={section}"
                )
        names = [section[rules.selector] for section in sections if rules.selector in section]
        if not names and field.default_factory is not dataclasses.MISSING:
            chosen.append((field.name, type(field.default_factory())))
            continue
        if not names:
            raise UserError(
                f"key `{rules.registry.key}` is not set; it must be one of {', '.join(rules.registry.names)}"
            )
        section_schema = rules.registry.schema(names[-1])
        chosen.append((field.name, section_schema))
    return cast(type[Schema], _with_sections(_declared(schema), tuple(chosen))) if chosen else schema


@functools.cache  # equal configurations have the same class
def _with_sections(schema: type, chosen: tuple[tuple[str, type], ...]) -> type:
    """Make a subclass of `schema` in which each chosen section has the given class."""
    metadata = {field.name: field.metadata for field in dataclasses.fields(schema)}
    fields = [
        (name, section, dataclasses.field(default_factory=section, metadata=metadata[name])) for name, section in chosen
    ]
    # Pickle finds classes by their names, which this one shares with `schema`; jobs of a study are pickled.
    namespace = {_DECLARED: schema, "__reduce__": lambda config: (_rebuilt, (schema, chosen, dict(vars(config))))}
    return dataclasses.make_dataclass(schema.__name__, fields, bases=(schema,), namespace=namespace)


def _rebuilt(schema: type, chosen: tuple[tuple[str, type], ...], values: dict[str, Any]) -> Any:
    return _with_sections(schema, chosen)(**values)


def _declared(schema: type) -> type:
    """Return the class that `_with_sections` derived `schema` from, or `schema` itself."""
    return cast(type, getattr(schema, _DECLARED, schema))


def replace_sections(config: Schema, **sections: Any) -> Schema:
    """Return a copy with other sections, which may have other classes of their registries."""
    assert dataclasses.is_dataclass(config)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | sections
    rules = {field.name: rules_of(field) for field in dataclasses.fields(config)}
    chosen = tuple((name, type(values[name])) for name, key in rules.items() if key is not None and key.registry)
    return cast(Schema, _with_sections(_declared(type(config)), chosen)(**values))


def _drop_deselected_keys(declared: type, schema: type, layers: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the layers without keys of a section class that a later layer or override replaces by another class.

    Until a layer names a class, the class is the default of `declared`.
    """
    assert dataclasses.is_dataclass(declared)
    assert dataclasses.is_dataclass(schema)
    selected: dict[str, Any] = {}
    for field in dataclasses.fields(declared):
        rules = rules_of(field)
        if rules is not None and rules.registry is not None and field.default_factory is not dataclasses.MISSING:
            selected[field.name] = getattr(field.default_factory(), rules.selector)
    for place, content in layers:
        kept = dict(content)
        for field in dataclasses.fields(schema):
            rules, section = rules_of(field), content.get(field.name)
            if rules is None or rules.registry is None or not isinstance(section, dict):
                continue
            name = selected[field.name] = section.get(rules.selector, selected.get(field.name))
            if name is not None:
                lacking = _names_of(rules.registry.schema(name)) - _names_of(field.default_factory)
                kept[field.name] = {key: value for key, value in section.items() if key not in lacking}
        yield place, kept


def _names_of(schema: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(schema)}


def _sections_of(field: str, selector: str, overrides: Sequence[str]) -> Iterator[Any]:
    """Yield the values that overrides give to a whole section, or to the key that selects its class."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == f"{field}.{selector}":
            yield {selector: value}
        elif key == field:
            yield _parse_override(override, object)[field]


def read_config(schema: type[Schema], content: dict[str, Any], where: str) -> Schema:
    """Make a configuration from a dictionary, with the checks of `load_config`.

    Errors name the origin of the keys, `where`, as in "in the request". Strings are literal, without interpolation.
    """
    return _merged(schema, [(where, content)], (), where)


def _checked(schema: type[Schema], config: DictConfig) -> Schema:
    result = _to_object(config)
    assert isinstance(result, schema)
    validate_keys(result)
    replace_inputs(result, _locate_input)
    validate = getattr(result, "validate", None)
    if validate is not None:
        validate()
    return result


def _locate_input(name: str, value: str) -> str:
    """Return the place of a shipped file. Raises UserError for what is no file or directory."""
    found = open_input(name, Path(value))
    return value if found == Path(value) else str(found)


def replace_inputs(config: Any, change: Callable[[str, str], str], prefix: str = "") -> None:
    """Replace the path of each input of a configuration by what `change` returns for its key and path."""
    for field in dataclasses.fields(config):
        value, rules, name = getattr(config, field.name), rules_of(field), f"{prefix}{field.name}"
        if isinstance(value, str) and rules is not None and rules.path is PathKind.INPUT:
            setattr(config, field.name, change(name, value))
        for part, section in value.items() if isinstance(value, dict) else ((None, value),):
            if dataclasses.is_dataclass(section):
                replace_inputs(section, change, f"{name}." if part is None else f"{name}.{part}.")


def copy_with_parents(path: Path, target: Path) -> None:
    """Copy a YAML file to `target`, and those that it extends beside it: the copy loads as the file does."""
    extended: Path | None = None
    chain = _read_chain(path)
    for number, (_, content) in enumerate(chain, start=1):
        copy = target if number == len(chain) else target.with_name(f"{target.stem}-{number}{target.suffix}")
        parent = {} if extended is None else {"extends": extended.name}
        atomic_write_text(copy, yaml.safe_dump({**parent, **content}, sort_keys=False, allow_unicode=True))
        extended = copy


def _read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the file and those that it extends, with their contents, the farthest parent first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: set[str] = set()
    following: Path | None = locate(path)
    while following is not None:
        if os.path.realpath(following) in seen:
            raise UserError(f"{following}: `extends` forms a cycle; remove one of the `extends` lines")
        if len(chain) == _LONGEST_CHAIN:
            raise UserError(f"{path}: `extends` leads through more than {_LONGEST_CHAIN} files; merge some of them")
        seen.add(os.path.realpath(following))
        content = _read_file(following)
        chain.append((following, content))
        parent = content.pop("extends", None)
        if parent is not None and not (isinstance(parent, str) and is_path(parent)):
            raise UserError(
                f"extends={shorten(parent)} in {following} is not possible; it must be the name of one YAML file"
            )
        following = None if parent is None else _parent_file(following.parent / parent, parent)
    return chain[::-1]


def _parent_file(path: Path, name: str) -> Path:
    """Return `path` or, if there is no such file, the shipped configuration called `name`."""
    return path if os.path.lexists(path) else shipped_names().get(name, path)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{explain_missing(path)}; give a YAML file: `scmdm configs` lists those that come with scmdm")
    content = read_yaml(path)
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected `key: value` lines")
    return content or {}


def _parse_override(override: str, schema: type) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(f"override {override!r} is not of the form key=value, as in optimizer.lr=3e-4")
    return _nest(name, _parse_value(override, text, *_declaration(schema, name)))


def _parse_value(override: str, text: str, hint: Any, rules: Key | None) -> Any:
    """Value of an override: unchanged for a text key, otherwise parsed as YAML.

    `null` unsets a key that may be unset, except free text.
    """
    if hint is str:
        return text
    if hint == (str | None):
        return None if text == "null" and not (rules is not None and rules.free_text) else text
    try:
        value = parse_yaml(text)
    except Exception as error:
        if hint is Any:  # a key of a mapping such as `metrics`, whose types are checked later
            return text
        raise UserError(f"override {shorten(override)} cannot be read: {describe(error)}") from error
    if hint == list[str] and isinstance(value, list):
        return yaml.load(text, yaml.BaseLoader)  # [1e5, NO] are texts
    # As text, a scalar still becomes the number or the name that the key turns out to be.
    return text if hint is Any and not (value is None or isinstance(value, list | dict)) else value


def _declaration(schema: Any, name: str) -> tuple[Any, Key | None]:
    """Type and rules of a key; `Any` inside a mapping of any values, None for an unknown key."""
    hint, rules = schema, None
    for part in name.split("."):
        if get_origin(hint) is dict:
            hint, rules = get_args(hint)[1], None
        elif dataclasses.is_dataclass(hint):
            fields = {field.name: field for field in dataclasses.fields(hint)}
            if part not in fields:
                return None, None
            hint, rules = type_hints(cast(Any, hint))[part], rules_of(fields[part])
        elif hint is not Any:
            return None, None
    return hint, rules


def _literal(value: Any) -> Any:
    """Mark what OmegaConf would interpret in the strings of a value."""
    if isinstance(value, dict):
        return {key: _literal(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(child) for child in value]
    if not isinstance(value, str):
        return value
    return _READ_BY_OMEGACONF.sub(lambda found: _MARKS[found[0]], value)


def _unmarked(text: str) -> str:
    """The text that `_literal` marked."""
    meant = {mark: text for text, mark in _MARKS.items()}
    return _MARKED.sub(lambda found: meant[found[0]], text)


def _restore(value: Any) -> Any:
    """Undo `_literal` in all strings; dataclasses, dictionaries and lists are changed in place."""
    if isinstance(value, str):
        return _unmarked(value) if _MARK in value else value
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            setattr(value, field.name, _restore(getattr(value, field.name)))
    elif isinstance(value, dict):
        value.update({key: _restore(child) for key, child in value.items()})
    elif isinstance(value, list):
        value[:] = [_restore(child) for child in value]
    return value


def _nest(key: str, value: Any) -> dict[str, Any]:
    *sections, last = key.split(".")
    nested: dict[str, Any] = {last: value}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


def _merge(config: DictConfig, content: dict[str, Any], where: str, *, literal: bool = True) -> None:
    schema = OmegaConf.get_type(config)
    _reject_replaced(schema, content, where)
    _reject_unknown(config, content, where, prefix="")
    for name, value, wanted in values_of_other_types(schema, content, "", literal):
        raise UserError(f"{name}={shorten(value)} {where} is not possible; it must be {wanted}")
    merged = _literal(content) if literal else content
    try:
        config.merge_with(merged)
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        key = getattr(error, "full_key", None) or _refused_key(config, merged)
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}={shorten(_lookup(content, key))} {where}: {_unmarked(reason)[:200]}") from error


def _refused_key(config: DictConfig, content: dict[str, Any]) -> str:
    """Return the first key of `content` that cannot be merged alone, for errors that do not name the key."""
    leaves = flatten(content)
    for key, value in itertools.islice(leaves.items(), _MOST_TRIED):
        try:
            OmegaConf.merge(config, _nest(key, value))
        except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
            return key
    return next(iter(leaves), "?")


def _reject_replaced(schema: type | None, content: dict[str, Any], where: str) -> None:
    remedies = replaced_keys(schema) if dataclasses.is_dataclass(schema) else {}
    for name, value in _values_of(remedies, content):
        raise UserError(f"key `{name}` (={shorten(value)}) {where} is no longer used; {remedies[name]}")


def _values_of(names: Iterable[str], content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted names that `content` sets, with their values."""
    for name in names:
        value: Any = content
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            yield name, value


def _reject_unknown(config: DictConfig, content: dict[str, Any], where: str, prefix: str) -> None:
    names = set(config)  # `in config` is false for a mandatory key without a value
    for key, value in content.items():
        if key not in names:
            raise UserError(_unknown_key_message(config, str(key), value, where, prefix))
        child = config._get_node(key)
        if (
            isinstance(value, dict)
            and isinstance(child, DictConfig)
            and dataclasses.is_dataclass(OmegaConf.get_type(child))
        ):
            _reject_unknown(child, value, where, f"{prefix}{key}.")


def _unknown_key_message(config: DictConfig, key: str, value: object, where: str, prefix: str) -> str:
    names = [str(name) for name in config]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean `{prefix}{near[0]}`?" if near else "see `scmdm <command> --help`"
    allowed = ", ".join(f"{prefix}{name}" for name in names)
    return f"unknown key `{prefix}{key}` (={shorten(value)}) {where}; {hint} (allowed: {allowed})"


def _lookup(content: Any, place: str) -> object:
    """Value at a place such as `arms.a.overrides[0]`, or the innermost one above it."""
    value = content
    for part in re.findall(r"[^.\[\]]+", place):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            break
    return value


def _to_object(config: DictConfig) -> object:
    try:
        return _restore(OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", "?")
        raise UserError(
            f"key `{key}` is not set; give it in the YAML file or as {key}=... on the command line"
        ) from error
    except OmegaConfBaseException as error:  # such as an interpolation of a missing key
        key = getattr(error, "full_key", None) or "?"
        raise UserError(f"key `{key}` cannot be resolved: {str(error).splitlines()[0]}") from error


def to_yaml(config: object, *, for_loading: bool = False) -> str:
    """Return the configuration as YAML, with every key; `for_loading`, such that `load_config` takes text literally."""
    assert dataclasses.is_dataclass(config)
    assert not isinstance(config, type)
    content = dataclasses.asdict(config)
    text: str = yaml.safe_dump(_literal(content) if for_loading else content, sort_keys=False, allow_unicode=True)
    return text


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested keys to dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
