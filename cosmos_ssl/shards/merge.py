"""Sets of shards joined in a list file, each as often as is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.manifest import load_manifest
from cosmos_ssl.data.scan import LIST_EXTENSION, expand, spread
from cosmos_ssl.data.storage import is_local, local_path
from cosmos_ssl.errors import BadSample, DataError, UserError
from cosmos_ssl.files import written_whole

_LOOK_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Merged:
    """What a list holds: shards and samples, as listed and as they are; for each set, the fields in which captions were
    found.
    """

    shards: int
    samples: int
    distinct_shards: int
    distinct_samples: int
    fields: Sequence[Sequence[str]]

    @property
    def common_schema(self) -> str | None:
        """The caption schema that reads the captions of all sets, None where each has the same fields."""
        if len({frozenset(own) for own in self.fields}) == 1:
            return None
        together = list(dict.fromkeys(name for own in self.fields for name in own))
        return "all" if "txt" in together else f"json:{','.join(together)}"


def merge_shards(groups: Sequence[Sequence[str]], repeats: Sequence[int], path: Path) -> Merged:
    """Write a list file of all shards of the groups, each as often as its number says, and their manifest.

    Shards are named relative to the list where they lie below its folder. Raises UserError, DataError, OSError.
    """
    if path.suffix != LIST_EXTENSION:
        raise UserError(f"--output {path}: lists of shards end in {LIST_EXTENSION}")
    if path.exists():
        raise UserError(f"--output {path} exists. Give another name, or delete it")
    if len(repeats) != len(groups) or min(repeats) < 1:
        raise UserError(f"--repeat: give one whole number from 1 on for each of the {len(groups)} sets of shards")
    names = [expand(group) for group in groups]
    single = [name for group in names for name in group]
    if len(set(single)) < len(single):
        raise DataError(
            f"data: {next(n for i, n in enumerate(single) if n in single[:i])} is named twice. Repeat a set by --repeat"
        )
    sets = [Shards(group, manifest=load_manifest(group)) for group in names]  # a mistake in one set shows as its own
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        for group, times, given in zip(names, repeats, groups, strict=True):
            file.write(
                f"# {' '.join(given)}: {len(group):,} shards, {times} times\n".encode("utf-8", "surrogateescape")
            )
            lines = "".join(f"{_beside(name, path)}\n" for name in group)
            file.writelines([lines.encode("utf-8", "surrogateescape")] * times)
    manifest = load_manifest([str(path)])
    fields = [_fields(found) for found in sets]
    return Merged(len(manifest.shards), len(manifest), len(single), sum(map(len, sets)), fields)


def _fields(shards: Shards) -> list[str]:
    """The fields in which some evenly spread samples have captions."""
    found: dict[str, None] = {}
    for index in spread(len(shards), _LOOK_SAMPLES):
        try:
            found |= dict.fromkeys(shards.read(index).captions)
        except BadSample:  # a fault of its own
            continue
    return list(found)


def _beside(url: str, path: Path) -> str:
    if not is_local(url):
        return url
    return str(local_path(url).absolute()).removeprefix(f"{path.absolute().parent}/")
