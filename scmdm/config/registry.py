"""Implementations by name: sources, tokenizers, denoisers, domains, published layouts.

An entry names a class as `module:Class`, which is imported on first use, so that only its users need its dependencies.
The class has an attribute `Config`: the dataclass of the keys that belong to it; a layout is an object without keys.
Other packages add entries through entry points of the registry's group, under names that scmdm does not have.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

from scmdm.errors import UserError


class Registry:
    """Classes by name, imported lazily.

    `key` is the configuration key that selects a class, as in `source.name`; `group` is the entry point group, as in
    `scmdm.sources`; `formerly` maps earlier names to present ones.
    """

    def __init__(
        self, key: str, group: str, entries: Mapping[str, str], formerly: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.key = key
        self._group, self._own, self._formerly = group, dict(entries), dict(formerly)

    @cached_property
    def _entries(self) -> dict[str, str]:
        found = {point.name: point.value for point in importlib.metadata.entry_points(group=self._group)}
        return self._own | found

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the project's own first."""
        return tuple(dict.fromkeys((*self._own, *self._entries)))

    def load(self, name: object) -> Any:
        """Import the class named `name`. Raises UserError, which lists the names, for an unknown one."""
        if isinstance(name, str) and name in self._formerly and name not in self._entries:
            raise UserError(f"{self.key}={name!r} is no longer used; write {self.key}={self._formerly[name]}")
        if not isinstance(name, str) or name not in self._entries:
            raise UserError(f"{self.key}={name!r} is not possible; it must be one of {', '.join(self.names)}")
        if self._entries[name] != self._own.get(name, self._entries[name]):
            raise UserError(
                f"{self.key}={name!r} is ambiguous: an installed package has an entry point of this name in the group "
                f"{self._group} ({self._entries[name]}), which scmdm has itself; rename it, or uninstall the package"
            )
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def schema(self, name: object) -> type:
        """Return the dataclass of the keys that belong to `name`. Raises UserError as `load` does."""
        schema: type = self.load(name).Config
        return schema
