"""Finds parts by the metadata of installed distributions, loads the named ones, and checks their options.

Listing reads metadata alone; a part is imported by ``load``. Nothing here imports torch: the base class of
a group is looked up in ``cosmos_ssl.api`` when a part of it is loaded.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from types import SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any

from cosmos_ssl import __version__
from cosmos_ssl.errors import PluginError, did_you_mean
from cosmos_ssl.registry_docs import option_docs
from cosmos_ssl.registry_marks import Mark, mark_of

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

OWN = "cosmos-ssl"

API_VERSION = 1
"""Raised when a part written for the version before would no longer work."""

DISABLE_VARIABLE = "COSMOS_DISABLE_PLUGINS"

CODE = "python"
"""In the place of a distribution: ``python:MODULE.CLASS`` is a class that no distribution offers."""

NOT_INSTALLED = "This clone is not installed, so no parts are registered. Run: pip install -e ."


@dataclass(frozen=True, slots=True)
class Group:
    """One kind of part: what people call it, its base class in ``cosmos_ssl.api``, the keys that are not its options."""

    noun: str
    base: str
    reserved: tuple[str, ...] = ()


GROUPS: Mapping[str, Group] = {
    "augmenters": Group("augmenter", "Augmenter"),
    "heads": Group("head", "Head"),
    "losses": Group("loss", "Loss", ("loss_weight",)),
    "teachers": Group("teacher", "Teacher", ("update_when",)),
    "towers": Group("tower", "Tower"),
    "tokenizers": Group("tokenizer", "Tokenizer"),
    "datasets": Group("data set", "Dataset"),
    "evaluators": Group("evaluator", "Evaluator", ("every_epochs",)),
}


@dataclass(frozen=True, slots=True, order=True)
class Record:
    """One registered part, as the metadata of its distribution describes it."""

    group: str
    name: str
    distribution: str
    version: str
    object_path: str

    @property
    def source(self) -> str:
        """The distribution and its version, such as ``my-losses 0.3.1``."""
        return f"{self.distribution} {self.version}".strip()

    @property
    def own(self) -> bool:
        """Whether cosmos-ssl itself offers it."""
        return canonical(self.distribution) == OWN

    @property
    def qualified(self) -> str:
        """The name that says whose: ``DIST:NAME``."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f"{self.group}/{self.name} ({self.source}, {self.object_path})"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a part: a constructor argument after ``spec``. ``default`` is ``inspect.Parameter.empty`` where it must be given."""

    name: str
    type: Any
    default: Any
    doc: str = ""

    @property
    def required(self) -> bool:
        """Whether the config must give it."""
        return self.default is inspect.Parameter.empty

    @property
    def type_name(self) -> str:
        """The type as it is written in Python."""
        return type_name(self.type)


def canonical(distribution: str) -> str:
    """A distribution's name in the one spelling that packaging tools compare."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


# ---------------------------------------------------------------------------- discovery


def records() -> tuple[Record, ...]:
    """All registered parts, sorted by group and name; under ``COSMOS_DISABLE_PLUGINS=1`` cosmos-ssl's own alone."""
    own_only = os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")
    found = _discover(tuple(sys.path))
    return tuple(record for record in found if record.own) if own_only else found


def forget() -> None:
    """Read the metadata again at the next look-up (a distribution was installed meanwhile)."""
    _discover.cache_clear()
    _bounds.cache_clear()


@lru_cache(maxsize=4)
def _discover(path: tuple[str, ...]) -> tuple[Record, ...]:
    seen: set[str] = set()
    found: set[Record] = set()
    for distribution in metadata.distributions(path=list(path)):
        try:
            text = distribution.read_text("entry_points.txt")
            if not text or "cosmos_ssl." not in text:
                continue
            name, version = distribution.metadata["Name"], distribution.metadata["Version"]
            entries = distribution.entry_points
        except (TypeError, ValueError, OSError):
            continue  # files in no encoding, or that are no list of entry points, harm nobody else
        if not name or canonical(name) in seen:
            continue  # half removed, or shadowed: the first one on the path is the one that imports
        seen.add(canonical(name))
        for entry in entries:
            prefix, _, group = entry.group.rpartition(".")
            if prefix == "cosmos_ssl" and group in GROUPS:
                found.add(Record(group, entry.name, name, version or "?", entry.value))
    return tuple(sorted(found))


_given: dict[str, type[Any]] = {}


def class_name(cls: type[Any]) -> str:
    """The name by which a config calls this class: ``python:MODULE.CLASS``. It holds in this process, and wherever it can be imported."""
    name = f"{CODE}:{cls.__module__}.{cls.__qualname__}"
    _given[name] = cls
    return name


def check_installed() -> None:
    """Raise PluginError where not even cosmos-ssl's own parts are registered."""
    if not any(record.own for record in records()):
        raise PluginError(NOT_INSTALLED)


def find(group: str, name: str) -> Record:
    """The part that ``name`` (bare, or ``DIST:NAME``) means in ``group``.

    A bare name means cosmos-ssl's own part if there is one. Raises PluginError where nothing or more than
    one part answers to it.
    """
    check_installed()
    known = [record for record in records() if record.group == group]
    distribution, _, bare = name.rpartition(":")
    if distribution == CODE:
        module, _, cls = bare.rpartition(".")
        return Record(group, bare, CODE, "", f"{module}:{cls}")
    matches = [record for record in known if record.name == bare]
    if distribution:
        matches = [record for record in matches if canonical(record.distribution) == canonical(distribution)]
    else:
        matches = [record for record in matches if record.own] or matches
    if len(matches) > 1:
        offered = " and ".join(record.source for record in matches)
        choice = " or ".join(f"'{record.qualified}'" for record in matches)
        raise PluginError(f"{group}/{name} is offered by {offered}. Write {choice}.")
    if not matches:
        spellings = {spelling(record): record for record in known}
        listed = ", ".join(text if record.own else f"{text} ({record.source})" for text, record in spellings.items())
        hint = did_you_mean(name, list(spellings))
        raise PluginError(f"no {GROUPS[group].noun} named '{name}'.{hint}\nAvailable: {listed or 'none'}")
    return matches[0]


def spelling(record: Record) -> str:
    """How a config names this part: its bare name where that means it, else ``DIST:NAME``."""
    rivals = [other for other in records() if (other.group, other.name) == (record.group, record.name) and other != record]
    return record.name if record.own or not rivals else record.qualified


# ---------------------------------------------------------------------------- loading


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
        raise PluginError(f"{record} is no {wanted}: expected a subclass of cosmos_ssl.api.{wanted}, found {_described(found)}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise PluginError(f"{record} is an incomplete {wanted}: it does not define {missing}")
    reserved = {"type", *GROUPS[record.group].reserved}
    for option in options(found):
        if option.name in reserved:
            raise PluginError(f"{record} has an option named '{option.name}', which is reserved for the config. Rename it")
    return found


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _described(found: object) -> str:
    return f"the class {found.__qualname__}" if isinstance(found, type) else f"a {type(found).__name__}"


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
        if canonical(requirement.name) == OWN and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.append(requirement.specifier)
    return tuple(found)


# ---------------------------------------------------------------------------- options


_options: dict[type[Any], tuple[Option, ...]] = {}


def options(cls: type[Any]) -> tuple[Option, ...]:
    """The options of a part: its constructor's arguments after ``spec``, in their order.

    Raises PluginError where the constructor does not have the form of the contract.
    """
    if cls not in _options:
        _options[cls] = tuple(_read_options(cls))
    return _options[cls]


def _read_options(cls: type[Any]) -> Iterator[Option]:
    constructor = cls.__init__
    parameters = list(inspect.signature(constructor).parameters.values())[1:]  # without self
    if not parameters or parameters[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
        raise PluginError(f"{_path(cls)}: the first argument of the constructor must be the spec")
    docs = option_docs(cls, [parameter.name for parameter in parameters[1:]])
    for parameter in parameters[1:]:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise PluginError(f"{_path(cls)}: '{parameter.name}' must be keyword-only: options are typed arguments after '*'")
        annotation = _resolved(cls, parameter)
        yield Option(parameter.name, annotation, parameter.default, docs.get(parameter.name, ""))


_PLACE = re.compile(r"^cache_?|(?:^|_)(?:data|root|folder|dir|path|file|url)s?$")


def marks(group: str, cls: type[Any]) -> dict[str, Mark]:
    """The options of a part whose types say that they name a place, or are no part of a run.

    Of a data set that says so of none, which may be older than these types, those with the names of paths.
    """
    found = {option.name: mark for option in options(cls) if (mark := mark_of(option.type)) is not None}
    if found or group != "datasets":
        return found
    return {option.name: Mark.LOCATION for option in options(cls) if _PLACE.search(option.name)}


def _path(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _resolved(cls: type[Any], parameter: inspect.Parameter) -> Any:
    """The type of one option; each by itself, since the spec's may be imported for type checkers alone."""
    if parameter.annotation is inspect.Parameter.empty:
        raise PluginError(f"{_path(cls)}: the option '{parameter.name}' has no type")
    holder = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    scope = getattr(cls.__init__, "__globals__", {})
    try:
        return typing.get_type_hints(holder, globalns=scope, include_extras=True)[parameter.name]
    except Exception as error:
        raise PluginError(f"{_path(cls)}: the type of the option '{parameter.name}' cannot be read: {first_line(error)}") from error


def type_name(annotation: Any) -> str:
    """A type as it is written in Python, without module names and marks."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(inner[0])
    if origin in (typing.Union, UnionType):
        return " | ".join(map(type_name, inner))
    if isinstance(origin, type) and inner:
        return f"{origin.__name__}[{', '.join('...' if one is ... else type_name(one) for one in inner)}]"
    if isinstance(annotation, type):
        return annotation.__name__ if annotation is not type(None) else "None"
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", str(annotation).replace("NoneType", "None"))


def check_options(record: Record, cls: type[Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Hold the options of a config against the constructor's signature.

    Returns the values in the argument's types (an int for a float, a list for a tuple are converted, nothing
    else is; a null where None is no value stands for the default), and the faults as (key, message); a key may
    reach into a value (``scale.1``) and is empty where no key of the config is at fault. Numbers that are not finite, or
    need more than 64 bits, are no value of any option.
    """
    known = {option.name: option for option in options(cls)}
    values: dict[str, Any] = {}
    faults: list[tuple[str, str]] = []
    for key, value in given.items():
        if key not in known:
            faults.append((key, _unknown(record, cls, key, list(known))))
            continue
        converted, found = (None, odd) if (odd := _odd_numbers(key, value)) else _convert(record, known[key], value)
        if not found:
            values[key] = converted
        elif value is not None:
            faults.extend(found)
    for option in known.values():
        if option.required and option.name not in values and not any(key.split(".")[0] == option.name for key, _ in faults):
            faults.append(("", f"{cls.__name__} ({record.source}) needs the option '{option.name}' ({option.type_name})"))
    return values, faults


def _unknown(record: Record, cls: type[Any], key: str, known: Sequence[str]) -> str:
    reserved = GROUPS[record.group].reserved
    accepted = "; and ".join(text for text in (", ".join(known), ", ".join(reserved)) if text)
    hint = did_you_mean(key, [*known, *reserved])
    return f"unknown option of {cls.__name__} ({record.source}).{hint} Accepts: {accepted or 'none'}"


def _convert(record: Record, option: Option, value: Any) -> tuple[Any, list[tuple[str, str]]]:
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(option.type)
    except PydanticUserError as error:
        raise PluginError(f"{record}: the option '{option.name}' has the type {option.type_name}, which no config can hold") from error
    try:  # JSON's rules, because there a list may become a tuple while all else stays strict
        return adapter.validate_json(json.dumps(value), strict=True), []
    except ValidationError as error:
        return None, [(".".join((option.name, *path)), message) for path, message in describe_errors(error.errors(), value)]


def _odd_numbers(path: str, value: Any) -> list[tuple[str, str]]:
    """Faults of the numbers inside a value that no computation can use."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [fault for key, item in items for fault in _odd_numbers(f"{path}.{key}", item)]
    if isinstance(value, float) and not math.isfinite(value):
        return [(path, f"expected a finite number, got {shown(value)}")]
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return [(path, f"expected a number of at most 64 bits, got {shown(value)}")]
    return []


_UNKNOWN = "unknown key"


def describe_errors(errors: Iterable[Mapping[str, Any]], value: Any) -> list[tuple[tuple[str, ...], str]]:
    """Pydantic's errors on ``value`` as (path into the value, message); the branches of a union become one message."""
    wanted: dict[tuple[str, ...], list[str]] = {}
    found: dict[tuple[str, ...], Any] = {}
    for error in errors:
        path, inner = [], value
        for step in error["loc"]:  # steps that name a branch of a union are no keys of the value
            inside = isinstance(inner, Mapping) and step in inner
            if inside or (isinstance(inner, list) and isinstance(step, int) and step < len(inner)):
                path.append(str(step))
                inner = inner[step]
        wanted.setdefault(tuple(path), []).append(_plain_words(error))
        found[tuple(path)] = inner
    return [
        (path, _UNKNOWN if _UNKNOWN in words else f"expected {' or '.join(dict.fromkeys(words))}, got {shown(found[path])}")
        for path, words in wanted.items()
    ]


def _plain_words(error: Mapping[str, Any]) -> str:
    """What pydantic expected, in a config's words."""
    if error["type"] == "missing":
        step = error["loc"][-1]
        return f"at least {step + 1} values" if isinstance(step, int) else f"a value for '{step}'"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _UNKNOWN
    words = re.sub(r"^[\w ]+ should (?:be|have) ", "", error["msg"]).partition(", got ")[0].partition(" after validation")[0]
    words = re.sub(r"\ba valid (?=[aeiou])", "an ", words).replace("a valid ", "a ")
    return re.sub(r"\ban object|\ba dictionary", "a mapping", words).replace("an array", "a list")


def shown(value: Any) -> str:
    """A value as a config would write it, cut to a line's length."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
