"""Finds parts by name in the metadata of installed distributions; imports none of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

from cosmos_ssl.errors import PluginError, did_you_mean

OWN = "cosmos-ssl"

DISABLE_VARIABLE = "COSMOS_DISABLE_PLUGINS"

CODE = "python"
"""In the place of a distribution: ``python:MODULE.CLASS`` is a class that no distribution offers."""

NOT_INSTALLED = "This clone is not installed, so no parts are registered. Run: pip install -e ."


@dataclass(frozen=True, slots=True)
class Group:
    """One kind of part: what people call it, and its base class in ``cosmos_ssl.api``."""

    noun: str
    base: str
    reserved: tuple[str, ...] = ("type",)
    """Keys of its section of a config that are the engine's, and no options: the fields of ``config.sections``."""


_OPTIMIZER = ("lr", "weight_decay", "weight_decay_end", "layer_decay", "rules")
_SCHEDULE = ("epochs", "max_steps", "warmup_steps", "warmup_start_lr", "final_lr")

GROUPS: Mapping[str, Group] = {
    "augmenters": Group("augmenter", "Augmenter"),
    "heads": Group("head", "Head"),
    "losses": Group("loss", "Loss", ("type", "loss_weight")),
    "teachers": Group("teacher", "Teacher", ("type", "update_when")),
    "towers": Group("tower", "Tower"),
    "tokenizers": Group("tokenizer", "Tokenizer"),
    "datasets": Group("data set", "Dataset"),
    "evaluators": Group("evaluator", "Evaluator", ("type", "every_epochs")),
    "optimizers": Group("optimiser", "Optimizer", ("type", *_OPTIMIZER)),
    "schedules": Group("schedule", "Schedule", ("type", *_SCHEDULE)),
    "writers": Group("writer", "Writer"),
    "callbacks": Group("callback", "Callback"),
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
        """Return whether cosmos-ssl itself offers it."""
        return canonical(self.distribution) == OWN

    @property
    def qualified(self) -> str:
        """The name that says whose: ``DIST:NAME``."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f"{self.group}/{self.name} ({self.source}, {self.object_path})"


def canonical(distribution: str) -> str:
    """A distribution's name in the one spelling that packaging tools compare."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def records() -> tuple[Record, ...]:
    """All registered parts, sorted by group and name; under ``COSMOS_DISABLE_PLUGINS=1`` cosmos-ssl's own alone."""
    own_only = os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")
    found = discover(tuple(sys.path))
    return tuple(record for record in found if record.own) if own_only else found


@lru_cache(maxsize=4)
def discover(path: tuple[str, ...]) -> tuple[Record, ...]:
    """The parts that the distributions on ``path`` offer; read once."""
    seen: set[str] = set()
    found: set[Record] = set()
    for distribution in metadata.distributions(path=list(path)):
        try:
            text = distribution.read_text("entry_points.txt")
            if not text or "cosmos_ssl." not in text:
                continue
            about = distribution.metadata  # importlib_metadata's, where somebody imports it: what lacks is a KeyError
            name = about["Name"] if "Name" in about else None  # noqa: SIM401
            version = about["Version"] if "Version" in about else None  # noqa: SIM401
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
    """The name of this part in a config: its bare name where that means it, else ``DIST:NAME``."""
    rivals = [
        other for other in records() if (other.group, other.name) == (record.group, record.name) and other != record
    ]
    return record.name if record.own or not rivals else record.qualified
