"""How a YAML file, overrides and defaults become a checked config, and where each value was written."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from cosmos_ssl import registry
from cosmos_ssl.config.sections import Config
from cosmos_ssl.config.source import MAX_KEYS, Node, fault, find_config, merge, parse_overrides, read_file, read_mapping
from cosmos_ssl.errors import ConfigError, PluginError, did_you_mean

SINGLE_PARTS = {
    "model.image": "towers",
    "model.text": "towers",
    "tokenizer": "tokenizers",
    "augmenters.image": "augmenters",
    "augmenters.text": "augmenters",
    "teacher": "teachers",
    "data": "datasets",
}
"""Key path of each part there is at most one of -> its group."""

NAMED_GROUPS = ("heads", "losses", "evaluators")
"""Sections, named as their groups, that hold any number of parts by name."""


def part_paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Key path, group and keys of every part of a plain tree, whether or not the tree is valid."""
    for path, group in SINGLE_PARTS.items():
        value: Any = tree
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            yield path, group, value
    for group in NAMED_GROUPS:
        named = tree.get(group)
        for name, value in named.items() if isinstance(named, Mapping) else ():
            if isinstance(value, Mapping):
                yield f"{group}.{name}", group, value


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config that passed the first stage, and where its values were written."""

    config: Config
    tree: dict[str, Any]
    """All values, defaults of the sections included, as plain dicts, lists and scalars."""
    root: Node
    path: Path | None = None

    def origin(self, path: str) -> str:
        """Tell where the value under a key path was written: ``file:line``, ``command line`` or ``default``."""
        node = self.root.at(path.split("."))
        return node.origin if node is not None else "default"

    def fault(self, path: str, message: str) -> str:
        """A fault of the value under a key path, for ConfigError: where it, or what is above it, was written."""
        return fault(self.root.nearest(path.split(".")).origin, path, message)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, merge and check a config without importing a part.

    ``source`` is a file, the name of a config that comes with cosmos-ssl (``quickstart``, ``cosmos/vitb16_cc3m``), or
    the tree itself, where a part's ``type`` may be its class; ``overrides`` are ``key.sub=value``. Raises UserError
    where there is no such file, ConfigError with all faults of the keys, values, part names and their agreement, and
    PluginError in a clone that is not installed.
    """
    registry.check_installed()
    faults: list[str] = []
    path = None if isinstance(source, Mapping) else find_config(source)
    try:
        written = read_mapping(source, faults) if isinstance(source, Mapping) else read_file(cast(Path, path), faults)
        root = merge(written, parse_overrides(overrides, faults))
        tree: dict[str, Any] = _at_home(root.plain())
        odd = _unwritable(tree)
    except RecursionError as error:
        raise ConfigError([fault(str(path or "config"), "", "nested too deeply")]) from error
    if odd:  # the next steps would stumble over them
        raise ConfigError(faults + _located(root, odd))
    if path is not None and tree.get("name") is None:
        tree["name"] = path.stem
    config, found = _validate(tree)
    found += _part_faults(tree)
    found += _needless_nulls(root)
    if config is not None:
        found += _agreement_faults(config)
    faults += _located(root, found)
    if faults or config is None:
        raise ConfigError(faults)
    return LoadedConfig(config, config.model_dump(), root, path)


def _located(root: Node, found: Found) -> list[str]:
    return [fault(root.nearest(keys).origin, ".".join(keys), message) for keys, message in found]


Found = list[tuple[list[str], str]]
"""Faults before they are located: the keys that lead there, and the message."""


_HOME = re.compile(r"(?:^|(?<=::))~[\w.-]*(?=/|::|$)")


def _at_home(value: Any) -> Any:
    """The same values, ``~/`` and ``~user/`` at the start of a path as the home folder."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return _HOME.sub(_home, value) if isinstance(value, str) else value


def _home(found: re.Match[str]) -> str:
    try:
        return str(Path(found[0]).expanduser())
    except RuntimeError:  # nobody of this name, or no home
        return found[0]


def _unwritable(value: Any, keys: tuple[str, ...] = ()) -> Found:
    """Keys and strings that no file of a run could hold, or no path: with a zero byte, or half a character; and depths
    that none has.
    """
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if inside and len(keys) > MAX_KEYS:
        return [([*keys], "nested too deeply")]
    found = [fault for key, item in inside for fault in _unwritable(item, (*keys, str(key)))]
    if any(isinstance(text, str) and _NO_TEXT.search(text) for text in (value, *keys[-1:])):
        found.append(([*keys], "holds a character that no text has"))
    return found


_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def _needless_nulls(root: Node) -> Found:
    """Nulls in the place of named parts that are not there: most likely another name was meant."""
    found: Found = []
    for group in NAMED_GROUPS:
        named = root.at([group])
        nodes = named.value if named is not None and isinstance(named.value, dict) else {}
        there = [name for name, node in nodes.items() if node.value is not None or node.removes]
        noun = registry.GROUPS[group].noun
        found += [
            ([group, name], f"there is no {noun} of this name to remove.{did_you_mean(name, there)}")
            for name in nodes
            if name not in there
        ]
    return found


def _validate(tree: dict[str, Any]) -> tuple[Config | None, Found]:
    """Validate ``tree``; a null where None is no value is taken out of it (``key: null`` removes a key)."""
    while True:
        try:  # JSON's rules: lists may become tuples while all else stays strict
            return Config.model_validate_json(json.dumps(tree)), []
        except ValidationError as error:
            errors = error.errors(include_url=False)
        removed = False
        for *above, key in (found["loc"] for found in errors if found["type"] != "extra_forbidden"):
            holder: Any = tree
            for step in above:
                holder = holder[step]
            if isinstance(holder, dict) and holder.get(key, "") is None:
                del holder[key]
                removed = True
        if not removed:
            return None, [([str(step) for step in found["loc"]], _message(found)) for found in errors]


def _message(error: Mapping[str, Any]) -> str:
    *above, key = (str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        accepted = _keys(above)
        return f"unknown key.{did_you_mean(key, accepted)} Accepts: {', '.join(accepted)}"
    if error["type"] == "missing":
        return "missing: name a part" if key == "type" else "missing"
    return registry.describe_errors([{**error, "loc": ()}], error["input"])[0][1]


def _keys(path: Sequence[str]) -> list[str]:
    """The keys of the section under ``path``."""
    section: Any = Config
    for key in path:
        of_section = hasattr(section, "model_fields")  # else a dictionary of sections
        section = section.model_fields[key].annotation if of_section else typing.get_args(section)[-1]
        if type(None) in typing.get_args(section):
            section = typing.get_args(section)[0]
    return [*([] if path else ["extends"]), *section.model_fields]


def _part_faults(tree: Mapping[str, Any]) -> Found:
    """Part names that no installed distribution offers, and names of parts that cannot be used as such."""
    found: Found = []
    for path, group, keys in part_paths(tree):
        steps = path.split(".", 1) if group in NAMED_GROUPS else path.split(".")
        if group in NAMED_GROUPS and not re.fullmatch(r"[A-Za-z_][\w-]{0,99}", steps[1]):
            found.append((steps, f"{registry.shown(steps[1])} is no name: use letters, digits, - and _, at most 100"))
        if isinstance(keys.get("type"), str):
            try:
                registry.find(group, keys["type"])
            except PluginError as error:
                found.append(([*steps, "type"], str(error)))
    return found


def _agreement_faults(config: Config) -> Found:
    """Sections that do not fit one another."""
    found: Found = []
    if config.folder.parts[:1] and config.folder.parts[0].startswith("~"):
        found.append((["output_dir"], f"no home folder is known for {config.folder.parts[0]}"))
    batch, micro, lanes = config.training.batch_size, config.training.micro_batch_size, config.loader.lanes
    if micro is not None and batch % micro:
        found.append((["training", "micro_batch_size"], f"{micro} does not divide training.batch_size ({batch})"))
    if lanes is not None and batch % lanes:
        found.append((["loader", "lanes"], f"{lanes} does not divide training.batch_size ({batch})"))
    if config.model.image is None and config.model.text is None:
        found.append((["model"], "needs a tower: give model.image, model.text or both"))
    if config.model.text is not None and config.tokenizer is None:
        found.append((["model", "text"], "a text tower needs a tokenizer: give tokenizer, for example {type: clip}"))
    elif config.augmenters.text is not None and config.tokenizer is None:
        found.append((["augmenters", "text"], "its texts need a tokenizer: give tokenizer, for example {type: clip}"))
    for modality in ("image", "text"):
        tower, augmenter = getattr(config.model, modality), getattr(config.augmenters, modality)
        if tower is not None and augmenter is None:
            found.append((["model", modality], f"nothing makes its views: give augmenters.{modality}"))
    if not config.losses:
        found.append((["losses"], "there is nothing to train on: give at least one loss"))
    return found
