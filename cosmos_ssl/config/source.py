"""YAML and command-line overrides as a tree of values that know where they were written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias, cast

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

import cosmos_ssl
from cosmos_ssl.errors import ConfigError, UserError, did_you_mean, printable
from cosmos_ssl.registry import GROUPS, class_name, shown

Scalar: TypeAlias = "str | int | float | bool | None"

COMMAND_LINE = "command line"

MAX_VALUES = 20_000
"""Values of one file, aliases counted each time they are used."""

MAX_BYTES = 1 << 20
"""Of one file."""

MAX_FILES = 100
"""Files that a config extends, directly and by way of others, each counted as often as it is named."""

MAX_KEYS = 32
"""Keys of one override's path."""

_CORE = {  # YAML 1.2's core schema: what a plain scalar means, and the characters it may start with
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
}


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it was written: ``file:line``, or ``command line``."""

    value: Scalar | list[Node] | dict[str, Node]
    origin: str
    removes: bool = False
    """A null that stands over something."""

    def at(self, path: Sequence[str]) -> Node | None:
        """The node under a key path, or None."""
        node: Node | None = self
        for key in path:
            if node is None:
                return None
            if isinstance(node.value, list):
                node = node.value[int(key)] if key.isdigit() and int(key) < len(node.value) else None
            else:
                node = node.value.get(key) if isinstance(node.value, dict) else None
        return node

    def plain(self) -> Any:
        """The value alone, in dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def nearest(self, path: Sequence[str]) -> Node:
        """The node under a key path, or the nearest one above it that was written down."""
        return next(node for end in range(len(path), -1, -1) if (node := self.at(path[:end])) is not None)


def fault(origin: str, path: str, message: str) -> str:
    """One fault, as it is shown: where, which key, what; further lines stand under the key."""
    margin = f"{origin}  "
    head = f"{margin}{path}: " if path else margin
    return printable(head + message.replace("\n", "\n" + " " * len(margin)))


def from_plain(value: Any, origin: str, path: str = "") -> Node:
    """The node of a value that was given as Python objects. Raises ConfigError for what no config can hold."""
    if isinstance(value, Mapping):
        return Node(
            {str(key): from_plain(item, origin, f"{path}.{key}" if path else str(key)) for key, item in value.items()},
            origin,
        )
    if isinstance(value, list | tuple):
        return Node([from_plain(item, origin, f"{path}.{i}") for i, item in enumerate(value)], origin)
    if isinstance(value, type):
        return Node(class_name(value), origin)
    if isinstance(value, os.PathLike):
        return Node(os.fsdecode(value), origin)
    if value is None or isinstance(value, str | bool | int | float):
        return Node(value, origin, removes=value is None)  # whoever put the tree together may have merged it already
    if isinstance(value, Real):  # a number of another library
        return Node(int(value) if isinstance(value, Integral) else float(value), origin)
    raise ConfigError([fault(origin, path, f"a {type(value).__name__} is nothing that a config can hold")])


_KEPT = {"optimizer": GROUPS["optimizers"].reserved[1:], "schedule": GROUPS["schedules"].reserved[1:]}
"""Keys of two sections that are the engine's, whichever part is chosen: they stay when the ``type`` changes."""


def merge(parent: Node, child: Node, kept: Sequence[str] = ()) -> Node:
    """``child`` over ``parent``: mappings by key, unless the child names another ``type``; all else is replaced.

    Keys of the parent that are ``kept`` stay even then.
    """
    if child.value is None:
        return replace(child, removes=parent.value is not None or parent.removes)
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    old, new = parent.value.get("type"), child.value.get("type")
    if old is not None and new is not None and old.value != new.value:
        return replace(child, value={key: parent.value[key] for key in kept if key in parent.value} | child.value)
    merged = dict(parent.value)
    for key, node in child.value.items():
        merged[key] = merge(merged[key], node, _KEPT.get(key, ())) if key in merged else node
    return Node(merged, parent.origin if child.origin == COMMAND_LINE else child.origin)


# ---------------------------------------------------------------------------- YAML


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's way from text to marked nodes, with the scalars of YAML 1.2."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, which also quotes the strings that YAML 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _CORE.items():
    for _class in (_Composer, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)


class _Converter:
    """Turns YAML's nodes into ours; faults are collected."""

    def __init__(self, origin: Callable[[int], str], faults: list[str]) -> None:
        self.origin = origin
        self.faults = faults
        self.count = 0

    def convert(self, node: yaml.Node, origin: str, path: str = "") -> Node:
        self.count += 1
        if self.count > MAX_VALUES:
            raise ConfigError([fault(origin, "", f"more than {MAX_VALUES:,} values: aliases expand to too many")])
        if isinstance(node, MappingNode):
            return Node(self._mapping(node, path), origin)
        if isinstance(node, SequenceNode):
            items = [
                self.convert(item, self.origin(item.start_mark.line), f"{path}.{i}")
                for i, item in enumerate(node.value)
            ]
            return Node(items, origin)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in (*_CORE, "str"):
            self.faults.append(fault(origin, path, f"the tag {node.tag} means nothing here"))
        return Node(_scalar(kind, node.value), origin)

    def _mapping(self, node: MappingNode, path: str) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key, value in node.value:
            origin = self.origin(key.start_mark.line)
            if not isinstance(key, ScalarNode):
                self.faults.append(fault(origin, path, "a key must be a plain name"))
                continue
            inner = f"{path}.{key.value}" if path else key.value
            if key.value in found:
                self.faults.append(fault(origin, inner, f"given twice, first at {found[key.value].origin}"))
            found[key.value] = self.convert(value, origin, inner)
        return found


def _scalar(kind: str, text: str) -> Scalar:
    try:
        if kind == "int":
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:  # an explicit tag on something else, or thousands of digits
        return text
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return None if kind == "null" else text


def parse_yaml(text: str, name: str, faults: list[str]) -> Node:
    """One YAML document as nodes; duplicate keys and the like are added to ``faults``.

    Raises ConfigError on broken YAML.
    """
    try:
        node = _Composer(text).get_single_node()
        converter = _Converter(lambda line: f"{name}:{line + 1}", faults)
        return (
            converter.convert(node, f"{name}:{node.start_mark.line + 1}") if node is not None else Node({}, f"{name}:1")
        )
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        words = " ".join(part for part in (error.problem, error.context) if part)
        raise ConfigError([fault(f"{name}:{line}", "", f"this is not valid YAML: {words}")]) from error
    except yaml.YAMLError as error:
        raise ConfigError([fault(name, "", f"this is not valid YAML: {' '.join(str(error).split())}")]) from error
    except RecursionError as error:
        raise ConfigError([fault(name, "", "nested too deeply, or an alias that contains itself")]) from error


def dump_yaml(tree: Mapping[str, Any], comment: Callable[[str], str] | None = None) -> str:
    """A tree of plain values as YAML that reads back equal; ``comment`` gives a remark on each key path."""
    lines = list(_lines(tree, "", ""))
    if comment is None:
        return "".join(f"{text}\n" for text, _ in lines)
    width = max((len(text) for text, _ in lines if len(text) < 80), default=0)
    return "".join(f"{text:<{width}}  # {comment(path)}\n" if path else f"{text}\n" for text, path in lines)


def _lines(tree: Mapping[str, Any], indent: str, path: str) -> Iterator[tuple[str, str]]:
    """Lines of block mappings, each with the key path of the value it ends with."""
    for key, value in tree.items():
        inner = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_flow(key)}:", ""
            yield from _lines(value, f"{indent}  ", inner)
        else:
            yield f"{indent}{_flow(key)}: {_flow(value)}", inner


def _flow(value: Any) -> str:
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text  # JSON is YAML, and keeps to one line


# ---------------------------------------------------------------------------- files


def config_folders() -> list[Path]:
    """The folders of the configs that come with cosmos-ssl: in the wheel, or in the clone it is installed from."""
    package = Path(cosmos_ssl.__file__).parent
    clone = package.parent
    folders = [package / "configs", *([clone / "configs"] if (clone / "pyproject.toml").is_file() else [])]
    return [folder for folder in folders if folder.is_dir()]


def packaged_configs() -> dict[str, Path]:
    """The configs that come with cosmos-ssl, by the name that finds them."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in reversed(config_folders())
        for path in sorted(folder.rglob("*.yaml"))
    }


def find_config(name: str | Path, beside: Path = Path()) -> Path:
    """The file that ``name`` means: seen from ``beside``, else packaged; ``.yaml`` may be left out.

    Raises UserError where there is none.
    """
    for folder in (beside, *config_folders()):
        for path in (folder / name, folder / f"{name}.yaml"):
            with suppress(OSError):  # a name that is too long, a folder that may not be entered
                if path.is_file():
                    return path if folder == beside else _short(path)
    with suppress(OSError):
        if (beside / name).exists():
            kind = "a folder" if (beside / name).is_dir() else "no regular file"
            raise UserError(f"no config '{name}': it is {kind}")
    hint = did_you_mean(str(name).removesuffix(".yaml"), list(packaged_configs()))
    raise UserError(
        f"no config '{name}': there is no such file, and none of this name comes with cosmos-ssl.{hint} See: "
        "cosmos-ssl config list"
    )


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_file(path: Path, faults: list[str]) -> Node:
    """A config file merged over what it extends. Raises ConfigError where one of the files cannot be read at all."""
    return _read(path, faults, (), [])


def _read(path: Path, faults: list[str], above: tuple[Path, ...], named: list[Path]) -> Node:
    """A file over what it extends; ``above`` are the files that led here, ``named`` all that were read so far."""
    named.append(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError([fault(str(path), "", f"is larger than {MAX_BYTES >> 20} MiB, and no config")])
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([fault(str(path), "", f"cannot be read: {error}")]) from error
    root = parse_yaml(text, str(path), faults)
    if not isinstance(root.value, dict):
        raise ConfigError([fault(root.origin, "", "a config is a mapping of keys to values")])
    return _extended(root, path.parent, faults, (*above, path.resolve()), named)


def read_mapping(tree: Mapping[str, Any], faults: list[str]) -> Node:
    """A config given as Python objects, merged over what it extends; a part's ``type`` may be its class."""
    return _extended(from_plain(tree, "config"), Path(), faults, (), [])


def _extended(root: Node, folder: Path, faults: list[str], seen: tuple[Path, ...], named: list[Path]) -> Node:
    """``root`` over the configs that its key ``extends`` names."""
    values = cast(dict[str, Node], root.value)
    own = Node({key: node for key, node in values.items() if key != "extends"}, root.origin)
    extends = values.get("extends")
    if extends is None:
        return own
    merged: Node | None = None
    for name in extends.plain() if isinstance(extends.value, list) else [extends.value]:
        if not isinstance(name, str):
            raise ConfigError([fault(extends.origin, "extends", "expected the name of a config, or a list of names")])
        try:
            base = find_config(name, folder)
        except UserError as error:
            raise ConfigError([fault(extends.origin, "extends", str(error))]) from error
        if base.resolve() in seen:
            chain = " -> ".join(file.name for file in (*seen, base.resolve()))
            raise ConfigError([fault(extends.origin, "extends", f"goes in a circle: {chain}")])
        if len(named) > MAX_FILES:
            raise ConfigError(
                [fault(extends.origin, "extends", f"more than {MAX_FILES} files, counted as often as they are named")]
            )
        parent = _read(base, faults, seen, named)
        merged = parent if merged is None else merge(merged, parent)
    return own if merged is None else merge(merged, own)


def copy_text(path: Path) -> str:
    """The text of a config that comes with cosmos-ssl, such that it works in any folder: ``extends`` as it is named
    there.
    """
    text = path.read_text(encoding="utf-8")
    root = _Composer(text).get_single_node()
    names = {file.resolve(): name for name, file in packaged_configs().items()}
    for key, value in root.value if isinstance(root, MappingNode) else ():
        if key.value == "extends":
            for node in reversed(value.value if isinstance(value, SequenceNode) else [value]):
                name = names[find_config(node.value, path.parent).resolve()]
                text = f"{text[: node.start_mark.index]}{name}.yaml{text[node.end_mark.index :]}"
    return text


# ---------------------------------------------------------------------------- overrides


def parse_overrides(overrides: Sequence[str], faults: list[str]) -> Node:
    """``key.sub=value`` arguments as one tree; what cannot be read is added to ``faults``."""
    root = Node({}, COMMAND_LINE)
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > MAX_KEYS:
            faults.append(fault(COMMAND_LINE, "", f"{shown(text)}: expected key.sub=value"))
            continue
        node = _override_value(value.strip(), path, faults)
        for key in reversed(keys):
            node = Node({key: node}, COMMAND_LINE)
        root = merge(root, node)
    return root


def _override_value(text: str, path: str, faults: list[str]) -> Node:
    """A YAML scalar, or a list or mapping in brackets; whatever is neither (shard names in braces) is a string."""
    braces = text.startswith("{") and ":" not in text and text != "{}"
    found: list[str] = []
    try:
        parsed = None if braces or text.startswith(("&", "!")) else _Composer(text).get_single_node()
        if parsed is None:
            return Node(None if text == "" else text, COMMAND_LINE)
        if isinstance(parsed, ScalarNode) or text[0] in "[{":
            node = _Converter(lambda line: COMMAND_LINE, found).convert(parsed, COMMAND_LINE, path)
            faults.extend(found)
            return node
    except (yaml.YAMLError, RecursionError):
        pass
    return Node(text, COMMAND_LINE)
