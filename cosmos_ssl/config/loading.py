"""How a YAML file, overrides and defaults become a checked config, and where each value was written."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from cosmos_ssl import registry
from cosmos_ssl.bounds import Curve
from cosmos_ssl.config.sections import Config
from cosmos_ssl.config.source import MAX_KEYS, Node, fault, find_config, merge, parse_overrides, read_file, read_mapping
from cosmos_ssl.errors import ConfigError, PluginError, UserError, did_you_mean, printable
from cosmos_ssl.files import read_object

SINGLE_PARTS = {
    "model.image": "towers",
    "model.text": "towers",
    "tokenizer": "tokenizers",
    "augmenters.image": "augmenters",
    "augmenters.text": "augmenters",
    "teacher": "teachers",
    "data": "datasets",
    "optimizer": "optimizers",
    "schedule": "schedules",
}
"""Key path of each part there is at most one of -> its group."""

NAMED_GROUPS = {
    "heads": "heads",
    "losses": "losses",
    "evaluators": "evaluators",
    "logging.writers": "writers",
    "callbacks": "callbacks",
}
"""Key path of each section that holds any number of parts by name -> their group."""

NAMED_BY_TYPE = ("logging.writers", "callbacks")
"""Those whose parts may leave ``type`` out: their name stands for it."""


def _section(tree: Any, path: str) -> Any:
    """What stands under a key path of a plain tree, valid or not; None where nothing does."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def part_paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Key path, group and keys of every part of a plain tree, whether or not the tree is valid."""
    for path, group in SINGLE_PARTS.items():
        value = _section(tree, path)
        if isinstance(value, Mapping):
            yield path, group, value
    for section, group in NAMED_GROUPS.items():
        named = _section(tree, section)
        for name, value in named.items() if isinstance(named, Mapping) else ():
            if isinstance(value, Mapping):
                yield f"{section}.{name}", group, value


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config that passed the first stage, and where its values were written."""

    config: Config
    tree: dict[str, Any]
    """All values, defaults of the sections included, as plain dicts, lists and scalars."""
    root: Node
    path: Path | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    """Key paths of losses that no installed package offers, of what is loaded for reading -> what is known of them."""

    def origin(self, path: str) -> str:
        """Tell where the value under a key path was written: ``file:line``, ``command line`` or ``default``."""
        node = self.root.at(path.split("."))
        return node.origin if node is not None else "default"

    def fault(self, path: str, message: str) -> str:
        """A fault of the value under a key path, for ConfigError: where it, or what is above it, was written."""
        return fault(self.root.nearest(path.split(".")).origin, path, message)


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, reading: bool = False
) -> LoadedConfig:
    """Read, merge and check a config without importing a part.

    ``source`` is a file, the name of a config that comes with cosmos-ssl (``quickstart``, ``cosmos/vitb16_cc3m``), or
    the tree itself, where a part's ``type`` may be its class; ``overrides`` are ``key.sub=value``. ``reading``: a model
    of it only encodes, which takes no losses, whether or not there is a package that offers them. Raises UserError
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
    for named in filter(None, (_section(tree, section) for section in NAMED_BY_TYPE)):
        for name, keys in named.items() if isinstance(named, dict) else ():
            if isinstance(keys, dict):
                keys.setdefault("type", name)
    config, found = _validate(tree)
    folders = [*([] if path is None else [path.parent]), *([] if config is None else [config.folder])]
    absent: dict[str, str] = {}
    found += _part_faults(tree, folders, absent if reading else None)
    found += _needless_nulls(root)
    if config is not None:
        found += _agreement_faults(config)
    faults += _located(root, found)
    if faults or config is None:
        raise ConfigError(faults)
    return LoadedConfig(config, config.model_dump(), root, path, absent)


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
    nouns = {section: registry.GROUPS[group].noun for section, group in NAMED_GROUPS.items()}
    for section, noun in {**nouns, "optimizer.rules": "rule"}.items():
        named = root.at(section.split("."))
        nodes = named.value if named is not None and isinstance(named.value, dict) else {}
        there = [name for name, node in nodes.items() if node.value is not None or node.removes]
        found += [
            ([*section.split("."), name], f"there is no {noun} of this name to remove.{did_you_mean(name, there)}")
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
            errors: dict[tuple[str | int, ...], list[Any]] = {}
            for found in error.errors(include_url=False):
                errors.setdefault(_path(tree, found), []).append(found)
        removed = False
        for *above, key in (path for path, found in errors.items() if found[0]["type"] != "extra_forbidden"):
            holder: Any = tree
            for step in above:
                holder = holder[step]
            if isinstance(holder, dict) and holder.get(key, "") is None:
                del holder[key]
                removed = True
        if not removed:
            outer = {path[:end] for path in errors for end in range(len(path))}  # other branches of a union
            faults = {path: found for path, found in errors.items() if path not in outer}
            return None, [([str(step) for step in path], _message(path, found)) for path, found in faults.items()]


def _path(tree: Any, error: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The keys that lead to an error, without those steps of pydantic's that name a branch of a union."""
    path: list[str | int] = []
    for number, step in enumerate(error["loc"], 1):
        if isinstance(tree, list) and str(step).isdigit():
            step = int(step)
        inside = step in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(step, int)
        if inside or (number == len(error["loc"]) and error["type"] in ("missing", "extra_forbidden")):
            path.append(step)
            tree = tree[step] if inside else None
    return tuple(path)


def _message(path: Sequence[str | int], errors: Sequence[Mapping[str, Any]]) -> str:
    *above, key = map(str, path)
    if errors[0]["type"] == "extra_forbidden":
        accepted = _keys(above)
        return f"unknown key.{did_you_mean(key, accepted)} Accepts: {', '.join(accepted)}"
    if errors[0]["type"] == "missing":
        return "missing: name a part" if key == "type" else "missing"
    return registry.describe_errors([{**error, "loc": ()} for error in errors], errors[0]["input"])[0][1]


def _keys(path: Sequence[str]) -> list[str]:
    """The keys of the section under ``path``."""
    section: Any = Config
    for key in path:
        of_section = hasattr(section, "model_fields")  # else a dictionary of sections
        section = section.model_fields[key].annotation if of_section else typing.get_args(section)[-1]
        if type(None) in typing.get_args(section):
            section = typing.get_args(section)[0]
    return [*([] if path else ["extends"]), *(field.alias or name for name, field in section.model_fields.items())]


def _part_faults(tree: Mapping[str, Any], folders: Sequence[Path], absent: dict[str, str] | None) -> Found:
    """Part names that no installed distribution offers, and names of parts that cannot be used as such.

    ``folders``: in which the run may lie, which knows who offered its parts; losses go into ``absent``, where given.
    """
    found: Found = []
    for path, group, keys in part_paths(tree):
        section = next((each for each in NAMED_GROUPS if path.startswith(f"{each}.")), None)
        name = None if section is None else path.removeprefix(f"{section}.")
        steps = path.split(".") if section is None or name is None else [*section.split("."), name]
        if name is not None and not re.fullmatch(r"[A-Za-z_][\w-]{0,99}", name):
            found.append((steps, f"{registry.shown(name)} is no name: use letters, digits, - and _, at most 100"))
        if isinstance(keys.get("type"), str):
            try:
                registry.find(group, keys["type"])
            except PluginError as error:
                had = _had(path, folders)
                if absent is not None and group == "losses":
                    absent[path] = had or keys["type"]
                else:
                    told = f"\nIts run had {had}: install that package" if had else ""
                    found.append(([*steps, "type"], f"{error}{told}"))
    return found


def _had(path: str, folders: Sequence[Path]) -> str:
    """Return what a run in one of these folders had under a key path, with its package, by its ``versions.json``."""
    for folder in folders:
        try:
            return printable(read_object(folder / "versions.json", {path: str}, "")[path])
        except (UserError, OSError):
            continue
    return ""


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
    if config.optimizer.weight_decay_end is not None and isinstance(config.optimizer.weight_decay, Curve):
        found.append((["optimizer", "weight_decay_end"], "optimizer.weight_decay has an end already. Leave one out"))
    found += [
        (["callbacks", name], "a file of checkpoints is called so. Give the callback another name")
        for name in config.callbacks
        if name in ("student", "teacher", "optimizer") or name.startswith("step_")
    ]
    if not config.losses:
        found.append((["losses"], "there is nothing to train on: give at least one loss"))
    return found
