"""Finds the built-in and third-party members of a kind: knobs, quantizers, samplers, exporters.

Built-ins are found by listing their package, so a bare tree without installed metadata works; third parties add through the
entry point group `autoeff.<kind>`. Adding one touches no other file.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from functools import cache
from typing import Any

from autoeff.errors import InputError

__all__ = ["plugin", "plugins"]


@cache
def plugins(package: str, base: type, group: str) -> dict[str, type[Any]]:
    """Every subclass of `base` by its `name`.

    Args:
        package: Dotted package whose modules hold the built-ins, one each.
        base: Abstract class with a class attribute `name`.
        group: Entry point group of third parties. A third party may not take a built-in's name.

    Raises:
        InputError: A third party that cannot be loaded, is of another kind or takes a name that exists.
    """
    found: dict[str, type[Any]] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for item in vars(module).values():
            if _concrete(item, base) and item.__module__ == module.__name__:
                found[item.name] = item
    for entry in importlib.metadata.entry_points(group=group):
        try:
            item = entry.load()
        except Exception as error:  # whatever a third party's module does when imported
            raise InputError(f"entry point {entry.value!r} of {group} cannot be loaded: {error!r}; mend or remove its package") from error
        if not _concrete(item, base):
            raise InputError(f"entry point {entry.value!r} of {group} is no concrete {base.__name__}")
        if item.name in found:
            raise InputError(f"entry point {entry.value!r} of {group} takes the name {item.name!r}, which exists already")
        found[item.name] = item
    return found


def plugin(package: str, base: type, group: str, name: str) -> type[Any]:
    """The member called `name`.

    Raises:
        InputError: There is none; the message lists those that exist.
    """
    known = plugins(package, base, group)
    if name not in known:
        raise InputError(f"unknown {group.removeprefix('autoeff.').removesuffix('s')} {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def _concrete(item: Any, base: type) -> bool:
    return inspect.isclass(item) and issubclass(item, base) and not inspect.isabstract(item) and "name" in vars(item)
