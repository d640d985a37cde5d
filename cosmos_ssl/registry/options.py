"""The options of parts: what a constructor's signature says of them, and whether what a config gives fits it."""

from __future__ import annotations

import inspect
import json
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from types import SimpleNamespace, UnionType
from typing import Any

from cosmos_ssl.errors import PluginError, did_you_mean, first_line
from cosmos_ssl.marks import Mark, mark_of
from cosmos_ssl.registry.docs import option_docs
from cosmos_ssl.registry.parts import GROUPS, Record


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a part: a constructor argument after ``spec``.

    ``default`` is ``inspect.Parameter.empty`` where it must be given.
    """

    name: str
    type: Any
    default: Any
    doc: str = ""

    @property
    def required(self) -> bool:
        """Return whether the config must give it."""
        return self.default is inspect.Parameter.empty

    @property
    def type_name(self) -> str:
        """The type as it is written in Python."""
        return type_name(self.type)


_options: dict[type[Any], tuple[Option, ...]] = {}


def options_of(cls: type[Any]) -> tuple[Option, ...]:
    """The options of a part: its constructor's arguments after ``spec``, in their order.

    Raises PluginError where the constructor does not have the form of the contract.
    """
    if cls not in _options:
        _options[cls] = tuple(_read_options(cls))
    return _options[cls]


def _read_options(cls: type[Any]) -> Iterator[Option]:
    constructor = cls.__init__
    parameters = list(inspect.signature(constructor).parameters.values())[1:]  # without self
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise PluginError(f"{_path(cls)}: the first argument of the constructor must be the spec")
    docs = option_docs(cls, [parameter.name for parameter in parameters[1:]])
    for parameter in parameters[1:]:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise PluginError(
                f"{_path(cls)}: '{parameter.name}' must be keyword-only: options are typed arguments after '*'"
            )
        annotation = _resolved(cls, parameter)
        yield Option(parameter.name, annotation, parameter.default, docs.get(parameter.name, ""))


def nested_options(option: Option) -> Iterator[Option]:
    """The keys inside the value of an option that is made of dataclasses or pydantic's models, by dotted names;
    ``NAME`` and ``N`` stand for any key of a mapping, and any place in a list.
    """
    yield from _nested(option.type, option.name, ())


def _nested(annotation: Any, path: str, above: tuple[Any, ...]) -> Iterator[Option]:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _nested(inner[0], path, above)
    elif origin in (typing.Union, UnionType):
        for one in inner:
            yield from _nested(one, path, above)
    elif isinstance(origin, type) and inner:
        keyed = issubclass(origin, Mapping)
        yield from _nested(inner[-1] if keyed else inner[0], f"{path}.{'NAME' if keyed else 'N'}", above)
    elif isinstance(annotation, type) and annotation not in above:
        for field in _fields(annotation):
            name = f"{path}.{field.name}"
            yield replace(field, name=name)
            yield from _nested(field.type, name, (*above, annotation))


def _fields(cls: type[Any]) -> list[Option]:
    """The keys of a dataclass, or a pydantic model, as options."""
    empty = inspect.Parameter.empty
    found: list[tuple[str, Any, Any, str]] = []
    if is_dataclass(cls):
        try:
            hints = typing.get_type_hints(cls, include_extras=True)
        except NameError:  # a name that only type checkers know
            hints = {}
        for one in fields(cls):
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            found.append((one.name, hints.get(one.name, one.type), empty if default is MISSING else default, ""))
    else:
        for name, field in getattr(cls, "model_fields", {}).items():
            default = empty if field.is_required() else field.get_default(call_default_factory=True)
            found.append((field.alias or name, field.annotation, default, field.description or ""))
    docs = option_docs(cls, [name for name, *_ in found]) if found else {}
    return [Option(name, kind, default, doc or docs.get(name, "")) for name, kind, default, doc in found]


_PLACE = re.compile(r"^cache_?|(?:^|_)(?:data|root|folder|dir|path|file|url)s?$")


def marks(group: str, cls: type[Any]) -> dict[str, Mark]:
    """The options of a part whose types say that they name a place, or are no part of a run.

    Of a data set that says so of none, which may be older than these types, those with the names of paths.
    """
    found = {option.name: mark for option in options_of(cls) if (mark := mark_of(option.type)) is not None}
    if found or group != "datasets":
        return found
    return {option.name: Mark.LOCATION for option in options_of(cls) if _PLACE.search(option.name)}


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
        raise PluginError(
            f"{_path(cls)}: the type of the option '{parameter.name}' cannot be read: {first_line(error)}"
        ) from error


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


def check_options(
    record: Record, cls: type[Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Hold the options of a config against the constructor's signature.

    Returns the values in the argument's types (an int for a float, a list for a tuple are converted, nothing else is; a
    null where None is no value stands for the default), and the faults as (key, message); a key may reach into a value
    (``scale.1``) and is empty where no key of the config is at fault. Numbers that are not finite, or need more than 64
    bits, are no value of any option.
    """
    known = {option.name: option for option in options_of(cls)}
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
        if (
            option.required
            and option.name not in values
            and not any(key.split(".")[0] == option.name for key, _ in faults)
        ):
            faults.append(
                ("", f"{cls.__name__} ({record.source}) needs the option '{option.name}' ({option.type_name})")
            )
    return values, faults


def _unknown(record: Record, cls: type[Any], key: str, known: Sequence[str]) -> str:
    reserved = GROUPS[record.group].reserved[1:]  # that ``type`` is one is plain
    accepted = "; and ".join(text for text in (", ".join(known), ", ".join(reserved)) if text)
    hint = did_you_mean(key, [*known, *reserved])
    return f"unknown option of {cls.__name__} ({record.source}).{hint} Accepts: {accepted or 'none'}"


def _convert(record: Record, option: Option, value: Any) -> tuple[Any, list[tuple[str, str]]]:
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(option.type)
    except PydanticUserError as error:
        raise PluginError(
            f"{record}: the option '{option.name}' has the type {option.type_name}, which no config can hold"
        ) from error
    try:  # JSON's rules, because there a list may become a tuple while all else stays strict
        return adapter.validate_json(json.dumps(value), strict=True), []
    except ValidationError as error:
        return None, [
            (".".join((option.name, *path)), _hinted(option, path, message))
            for path, message in describe_errors(error.errors(), value)
        ]


def _hinted(option: Option, path: Sequence[str], message: str) -> str:
    """Add to what is said of an unknown key inside an option's value which there are."""
    if message != _UNKNOWN:
        return message
    known = []
    for one in nested_options(option):
        _, *above, name = one.name.split(".")
        fits = len(above) == len(path) - 1 and all(a in ("NAME", "N", b) for a, b in zip(above, path, strict=False))
        known += [name] if fits else []
    return f"{message}.{did_you_mean(path[-1], known)} Accepts: {', '.join(known)}" if known else message


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
_WANTED = {
    "bool_type": "a boolean",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_type": "a string",
    "string_too_short": "at least {min_length} character{s}",
    "string_too_long": "at most {max_length} character{s}",
    "string_pattern_mismatch": "a string that matches {pattern}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "none_required": "null",
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "a list"),
    "too_short": "at least {min_length} item{s}",
    "too_long": "at most {max_length} item{s}",
    **dict.fromkeys(("dict_type", "model_type", "dataclass_type"), "a mapping"),
    "unexpected_keyword_argument": _UNKNOWN,
    "extra_forbidden": _UNKNOWN,
    "wanted": "{wanted}",  # our own: PydanticCustomError("wanted", "{wanted}", {"wanted": "a colour"})
}
"""What pydantic expected, in a config's words, by the type of its error; the places are keys of the error's context."""


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
        wanted.setdefault(tuple(path), []).append(_wanted(error))
        found[tuple(path)] = inner
    return [
        (
            path,
            _UNKNOWN
            if _UNKNOWN in words
            else f"expected {' or '.join(dict.fromkeys(words))}, got {shown(found[path])}",
        )
        for path, words in wanted.items()
        if not any(
            other[: len(path)] == path for other in wanted if len(other) > len(path)
        )  # another branch fits better
    ]


def _wanted(error: Mapping[str, Any]) -> str:
    """Return what pydantic expected, in a config's words."""
    if error["type"] == "missing":
        step = error["loc"][-1]
        return f"at least {step + 1} values" if isinstance(step, int) else f"a value for '{step}'"
    if error["type"] not in _WANTED:
        return f"another value ({error['msg']})"
    context: dict[str, Any] = error.get("ctx", {})
    plain = {key: f"{value:.15g}" if isinstance(value, float) else value for key, value in context.items()}
    count = context.get("min_length", context.get("max_length"))
    return _WANTED[error["type"]].format(**plain, s="" if count == 1 else "s")


def shown(value: Any) -> str:
    """A value as a config would write it, cut to a line's length."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
