"""Imports the parts that a config names, and holds them to the contract."""

from __future__ import annotations

import inspect
from functools import lru_cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from cosmos_ssl import __version__
from cosmos_ssl.errors import PluginError, first_line
from cosmos_ssl.registry.options import options_of
from cosmos_ssl.registry.parts import CODE, GROUPS, OWN, Record, canonical, discover

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet


def forget() -> None:
    """Read the metadata again at the next look-up (a distribution was installed meanwhile)."""
    discover.cache_clear()
    _bounds.cache_clear()


_given: dict[str, type[Any]] = {}


def class_name(cls: type[Any]) -> str:
    """The name by which a config calls this class: ``python:MODULE.CLASS``.

    It holds in this process, and wherever it can be imported.
    """
    name = f"{CODE}:{cls.__module__}.{cls.__qualname__}"
    _given[name] = cls
    return name


def given_classes() -> dict[str, type[Any]]:
    """The classes that were given in this process, by ``class_name``."""
    return dict(_given)


def give_class(name: str, cls: type[Any]) -> None:
    """Let a name mean a class that another process was given, whose main module has another name here."""
    _given[name] = cls


def load(record: Record, *, trust_code: bool = True) -> type[Any]:
    """Import a part and hold it to the contract.

    Raises PluginError where its distribution needs another cosmos-ssl, it cannot be imported, is not a concrete
    subclass of its group's base, or its constructor does not have the form of the contract; without ``trust_code`` also
    for a class that no distribution offers, unless it was given in this process.
    """
    if record.distribution != CODE:
        _check_bound(record)
    elif not trust_code and record.qualified not in _given:
        raise PluginError(
            f"'{record.qualified}' is code that no installed package offers, and what is loaded may not name any. "
            "If you trust where it comes from: trust_code=True, on the command line --trust-code"
        )
    try:
        entry = metadata.EntryPoint(name=record.name, value=record.object_path, group=record.group)
        found: Any = _given[record.qualified] if record.qualified in _given else entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit in a part's module is a fault of the part
        raise PluginError(f"{record} cannot be imported: {first_line(error)}") from error
    wanted = GROUPS[record.group].base
    base = getattr(import_module("cosmos_ssl.api"), wanted)
    if not (isinstance(found, type) and issubclass(found, base)):
        given = f"the class {found.__qualname__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise PluginError(f"{record} is no {wanted}: expected a subclass of cosmos_ssl.api.{wanted}, found {given}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise PluginError(f"{record} is an incomplete {wanted}: it does not define {missing}")
    for option in options_of(found):
        if option.name in GROUPS[record.group].reserved:
            raise PluginError(
                f"{record} has an option named '{option.name}', which is reserved for the config. Rename it"
            )
    return found


def _check_bound(record: Record) -> None:
    """Hold a distribution to its own requirement on cosmos-ssl."""
    for bound in _bounds(record.distribution):
        if not bound.contains(__version__, prereleases=True):
            raise PluginError(
                f"{record} needs cosmos-ssl {bound}, and this is {__version__}. "
                f"Install a fitting cosmos-ssl or another {record.distribution}"
            )


@lru_cache
def _bounds(distribution: str) -> tuple[SpecifierSet, ...]:
    """The versions of cosmos-ssl that a distribution asks for."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for text in metadata.distribution(distribution).requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # its installer's concern
        if canonical(requirement.name) == OWN and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            found.append(requirement.specifier)
    return tuple(found)
