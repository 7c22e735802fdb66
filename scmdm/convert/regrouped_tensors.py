"""Published tensors that scmdm divides otherwise: a matrix per expert, and maps fused into one matrix.

A regrouped source shows one tensor per parameter of scmdm, under names that do not occur in files: `*` in place of the
number of an expert, and `.q`, `.k` or `.v` after the name of a fused map. Exports go the other way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.config.model import ModelConfig
from scmdm.convert.published_files import PublishedFiles, Tensors
from scmdm.errors import UserError

_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,6})\.(.+)")
_FUSED = re.compile(r"(.*\.query_key_value)\.(weight|bias)")
_PART = re.compile(r"(.*\.query_key_value)\.([qkv])\.(weight|bias)")
_PARTS = "qkv"


@dataclass(frozen=True)
class _Stack:
    """Tensors of all experts, in their order."""

    names: list[str]
    shape: torch.Size


@dataclass(frozen=True)
class _Rows:
    """Rows of a fused tensor."""

    name: str
    first: int
    number: int


def regrouped(source: PublishedFiles, model: ModelConfig) -> PublishedFiles:
    """Return the source with stacked experts, and with queries, keys and values apart. Raises UserError."""
    tensors = _Regrouped(source, [model.attention_width, model.kv_width, model.kv_width])
    return dataclasses.replace(source, tensors=tensors)


def ungrouped(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Replace the tensors of a regrouped source, sorted by scmdm's names, by those of the files."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, value in weights:
        if (part := _PART.fullmatch(name)) is not None:
            fused = f"{part[1]}.{part[3]}"
            parts = waiting.setdefault(fused, {})
            parts[part[2]] = value
            if len(parts) == len(_PARTS):
                yield fused, torch.cat([waiting[fused][letter] for letter in _PARTS])
                del waiting[fused]
        elif ".*." in name:
            for number, expert in enumerate(value):
                yield name.replace("*", str(number)), expert.clone()  # not a part of the stack's memory
        else:
            yield name, value
    assert not waiting


class _Regrouped:
    """Implements `Tensors`."""

    def __init__(self, source: PublishedFiles, rows: list[int]) -> None:
        self._tensors: Tensors = source.tensors
        self._stacks: dict[str, _Stack] = {}
        self._rows: dict[str, _Rows] = {}
        self._shapes: dict[str, torch.Size] = {}
        experts: dict[str, dict[int, str]] = {}
        for name, shape in source.tensors.shapes().items():
            if (expert := _EXPERT.fullmatch(name)) is not None:
                experts.setdefault(f"{expert[1]}.*.{expert[3]}", {})[int(expert[2])] = name
            elif (fused := _FUSED.fullmatch(name)) is not None:
                self._divide(source, name, fused, shape, rows)
            else:
                self._shapes[name] = shape
        for stacked, names in experts.items():
            self._stack(source, stacked, names)

    def _divide(
        self, source: PublishedFiles, name: str, fused: re.Match[str], shape: torch.Size, rows: list[int]
    ) -> None:
        if len(shape) == 0 or shape[0] != sum(rows):
            raise UserError(f"{source.path}: {name} has shape {tuple(shape)}, expected {sum(rows)} rows")
        for number, letter in enumerate(_PARTS):
            part = f"{fused[1]}.{letter}.{fused[2]}"
            self._rows[part] = _Rows(name, sum(rows[:number]), rows[number])
            self._shapes[part] = torch.Size((rows[number], *shape[1:]))

    def _stack(self, source: PublishedFiles, stacked: str, names: dict[int, str]) -> None:
        shapes = {source.tensors.shapes()[name] for name in names.values()}
        if names.keys() != set(range(len(names))) or len(shapes) != 1:
            raise UserError(
                f"{source.path}: {stacked} has {len(names)} experts with {len(shapes)} shapes, which are not numbered "
                "0, 1, 2, ... or are not alike; the file is incomplete or not a model"
            )
        shape = next(iter(shapes))
        self._stacks[stacked] = _Stack([names[number] for number in range(len(names))], shape)
        self._shapes[stacked] = torch.Size((len(names), *shape))

    def shapes(self) -> dict[str, torch.Size]:
        return dict(self._shapes)

    def groups(self) -> list[list[str]]:
        """Names that are read together: of a file, of a fused tensor, and of the experts of a map."""
        unchanged = [[name for name in group if name in self._shapes] for group in self._tensors.groups()]
        fused: dict[str, list[str]] = {}
        for part, rows in self._rows.items():
            fused.setdefault(rows.name, []).append(part)
        return [*filter(None, unchanged), *fused.values(), *([name] for name in self._stacks)]

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        plain = [name for name in names if name not in self._stacks and name not in self._rows]
        if plain:
            yield from self._tensors.read(plain)
        for name in names:
            if name in self._rows:
                rows = self._rows[name]
                (_, value) = next(iter(self._tensors.read([rows.name])))
                yield name, value[rows.first : rows.first + rows.number].clone()
            elif name in self._stacks:
                yield name, self._read_stack(self._stacks[name])

    def _read_stack(self, stack: _Stack) -> Tensor:
        numbers = {name: number for number, name in enumerate(stack.names)}
        stacked: Tensor | None = None
        for group in self._tensors.groups():
            wanted = [name for name in group if name in numbers]
            for name, value in self._tensors.read(wanted) if wanted else ():
                if stacked is None:
                    stacked = value.new_empty(len(numbers), *stack.shape)
                stacked[numbers[name]] = value
        assert stacked is not None
        return stacked
