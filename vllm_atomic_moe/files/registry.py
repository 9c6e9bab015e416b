"""Choices of a command by name: pruning methods, formats to import.

Ours are the modules of one package, each with one attribute that describes it. Installed packages
add theirs by entry points; one that cannot be used is left out, and the reason kept.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from vllm_atomic_moe.files.plain_files import NAME, one_line
from vllm_atomic_moe.files.tensors import shorten

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Registry(Generic[Entry]):
    """Entries by name.

    Attributes:
        kind: what they are, in messages: "method".
        entries: name -> entry, ours first.
        packages: name -> "PACKAGE VERSION" of the entries that are not ours.
        refused: name -> one line that says why an installed entry is left out.
    """

    kind: str
    entries: Mapping[str, Entry]
    packages: Mapping[str, str]
    refused: Mapping[str, str]

    def find(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            ValueError: it is unknown, or left out.
        """
        if name in self.entries:
            return self.entries[name]
        if name in self.refused:
            raise ValueError(self.refused[name])
        raise ValueError(
            f"{self.kind} {shorten(name)} is not known; wanted one of {', '.join(self.entries)}"
        )


def load_registry(
    kind: str,
    group: str,
    package: str,
    attribute: str,
    wanted: type[Entry],
    check: Callable[[Entry, Mapping[str, Entry]], None] = lambda entry, others: None,
) -> Registry[Entry]:
    """Every module of `package`, then every entry point of `group`.

    Args:
        kind: what the entries are, in messages.
        group: name of the entry points.
        package: the package of our modules; `_` in a module's name is `-` in the entry's.
        attribute: name of the entry in each of these modules.
        wanted: the class of an entry.
        check: (entry, earlier entries) -> None; raises ValueError for an installed entry that
            conflicts with them.
    """
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    entries: dict[str, Entry] = {
        name.replace("_", "-"): getattr(importlib.import_module(f"{package}.{name}"), attribute)
        for name in sorted(module.name for module in modules)
    }
    packages: dict[str, str] = {}
    refused: dict[str, str] = {}
    points = sorted(entry_points(group=group), key=lambda point: (point.name, point.value))
    taken = Counter([*entries, *(point.name for point in points)])
    for point in points:
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else "no package"
        try:
            if taken[point.name] > 1:
                raise ValueError("another one has that name")
            entry = _load(point, wanted)
            check(entry, entries)
        except Exception as error:  # Foreign code may raise anything.
            refused[point.name] = (
                f"{kind} {shorten(point.name)} of the package {origin} cannot be used "
                f"({type(error).__name__}: {one_line(error)}); update or uninstall the package"
            )
            continue
        entries[point.name] = entry
        packages[point.name] = origin
    return Registry(kind, entries, packages, refused)


def _load(point: EntryPoint, wanted: type[Entry]) -> Entry:
    if not NAME.fullmatch(point.name):
        raise ValueError("a name is 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit")
    entry = point.load()
    if not isinstance(entry, wanted):
        raise ValueError(f"{point.value} is {type(entry).__name__}, wanted {wanted.__name__}")
    return entry
