"""What makes a run this run: the part of its config that changes the mathematics, its data, and what lies at the places
it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from cosmos_ssl.config import Config
from cosmos_ssl.config.sections import default_lanes
from cosmos_ssl.files import checkpoint_folders
from cosmos_ssl.registry import shown

_LOADER = ("workers", "prefetch", "error_budget", "changed_data")
_TRAINING = (
    *("micro_batch_size", "attention", "kernels", "compile", "deterministic", "device"),
    *("max_nonfinite_steps", "rollback", "timeout_minutes", "trace_steps", "parallel", "parallel_shards"),
)
_ASIDE = (
    *("name", "output_dir", "profile", "evaluators", "checkpoints", "logging"),
    *(f"loader.{key}" for key in _LOADER),
    *(f"training.{key}" for key in _TRAINING),
)
"""Sections and keys that change nothing of what is computed; of parts' options their types say so (``marks``)."""

_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A run's identity, as its folder keeps it."""

    config: Mapping[str, Any]
    """The whole tree, of which counts what is not ``_ASIDE``, with what lies at ``places`` in their stead."""
    data: Mapping[str, Any]
    """What the data set says of itself (``Dataset.identity``)."""
    places: Mapping[str, str | None] = field(default_factory=dict)
    """Key path of each option that is no value to compare -> what lies at the place that it names, or None where that
    is no part of a run or the data set tells it."""

    @classmethod
    def of(cls, config: Config, data: Mapping[str, Any], places: Mapping[str, str | None] | None = None) -> Identity:
        """The identity of a run that starts now, as JSON would give it back."""
        return cls(
            **json.loads(json.dumps({"config": config.model_dump(), "data": dict(data), "places": dict(places or {})}))
        )

    def plain(self) -> dict[str, Any]:
        """The form in which it is written."""
        return asdict(self)

    def digest(self) -> str:
        """Hash of what counts of the config."""
        text = json.dumps(_counted(self.config, self.places), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def config_changes(self, before: Identity) -> list[str]:
        """List what counts of the config and differs, as ``model.image.width: 768 -> 384``.

        Keys that one of the two lacks, because another version wrote it, count with their defaults. Where a version
        before wrote down no contents of a place, names are compared.
        """
        new, old = dict(self.places), dict(before.places)
        for path in {*new, *old}:
            if new.get(path, old.get(path)) is None:  # no part of a run, as one of the two knows
                new[path] = old[path] = None
            elif path not in new or path not in old:
                new.pop(path, None)
                old.pop(path, None)
        then = dict(leaves(_counted(_complete(before.config), old)))
        now = dict(leaves(_counted(_complete(self.config), new)))
        changes = []
        for path in dict.fromkeys((*then, *now)):
            was, is_now = then.get(path, _ABSENT), now.get(path, _ABSENT)
            if was != is_now:
                names = (_at(before.config, path), _at(self.config, path)) if path in new else (was, is_now)
                changes.append(_change(path, *names))
        return changes

    def data_changes(self, before: Identity) -> list[str]:
        """List what differs in the data, as ``data, samples: 20 -> 24``.

        What is known at one of the two times alone is no difference.
        """
        then, now = dict(leaves(before.data)), dict(leaves(self.data))
        return [_change(f"data, {key}", then[key], now[key]) for key in then if key in now and now[key] != then[key]]

    def begun_as(self, before: Identity) -> Identity:
        """This one in the precision that the run was begun in, where it leaves that open (``training.precision:
        auto``).
        """
        mine, theirs = self.config.get("training", {}), before.config.get("training", {})
        if mine.get("precision") != "auto" or "precision" not in theirs:
            return self
        return replace(self, config={**self.config, "training": {**mine, "precision": theirs["precision"]}})

    def knowing(self, before: Identity) -> Identity:
        """This one, with what was known of the same data before and is not now."""
        return replace(self, data=_merged(before.data, self.data))


def _change(path: str, before: Any, now: Any) -> str:
    old, new = ("not given" if value is _ABSENT else shown(value) for value in (before, now))
    return f"{path}: {old} " + ("holds something else now" if before == now else f"-> {new}")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(old[key], value)
        for key, value in new.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **new, **both}


def _at(tree: Mapping[str, Any], path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def _complete(tree: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return Config.model_validate_json(json.dumps(tree)).model_dump()
    except ValidationError:  # a key that this version no longer has: compared as it stands
        return dict(tree)


def _counted(tree: Mapping[str, Any], places: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what counts of a config, with what lies at ``places`` in their stead."""
    kept: dict[str, Any] = json.loads(json.dumps(tree))
    for path in (*_ASIDE, *places):
        *above, key = path.split(".")
        holder = kept
        for step in above:
            holder = holder.get(step) or {}
        if key in holder and places.get(path) is not None:
            holder[key] = places[path]
        else:
            holder.pop(key, None)
    loader, training = kept.get("loader"), kept.get("training")
    if loader and training and loader.get("lanes") is None:
        loader["lanes"] = default_lanes(training["batch_size"])
    if (schedule := kept.get("schedule") or {}).get("type") == "cosine":  # the only one once, and not written down
        del schedule["type"]
    if isinstance(rules := (kept.get("optimizer") or {}).get("rules"), dict):  # their names change nothing
        kept["optimizer"]["rules"] = [*rules.values()]
    pretrained = (kept.get("model") or {}).get("pretrained")
    if isinstance(pretrained, str) and "model.pretrained" not in places:
        kept["model"]["pretrained"] = PurePosixPath(pretrained).name
    return kept


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree by key path (``optimizer.lr``); lists and empty tables are values."""
    for key, value in tree.items():
        inner = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            yield from leaves(value, inner)
        else:
            yield inner, value


# ---------------------------------------------------------------------------- what lies at a place

_BLOCK, _BLOCKS = 1 << 16, 256


def fingerprint(places: str | Sequence[str]) -> str:
    """A hash of what lies at ``places``: sizes and blocks from all over the contents, or of a checkpoint its manifest.

    A name behind which there is no file here (a model on a hub) stands for itself. Up to 16 MiB are read whole. Raises
    OSError.
    """
    found = [_found(place) for place in ([places] if isinstance(places, str) else places)]
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()[:32]


def _found(place: str) -> str:
    path = Path(place).expanduser()
    if path.is_file():
        return _digest([("", path)])
    if not path.is_dir():
        return place
    folders = [path, *reversed(checkpoint_folders(path))]
    manifest = next((file for folder in folders if (file := folder / "manifest.json").is_file()), None)
    return _digest([("", manifest)] if manifest is not None else list(_files(path)))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below a folder by their names from there, without hidden ones."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inner.parts):
            yield inner.as_posix(), path


def _digest(files: Sequence[tuple[str, Path]]) -> str:
    """A hash over names, sizes, and blocks spread evenly over each file; ``_BLOCKS`` of them in all."""
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode("utf-8", "surrogateescape"))
        count = min(-(-size // _BLOCK), max(_BLOCKS // len(files), 1))
        with path.open("rb") as file:
            for number in range(count):
                file.seek(number * (size - _BLOCK) // max(count - 1, 1) if size > _BLOCK else 0)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]
