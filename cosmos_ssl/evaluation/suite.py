"""``--task all``: which tasks there is data for in a folder of data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation.caption_sets import caption_sets_in
from cosmos_ssl.evaluation.class_sets import KNOWN, class_sets_in
from cosmos_ssl.evaluation.pairs import MMVP_PICTURES
from cosmos_ssl.evaluation.segmentation_sets import segmentation_sets_in


class Item(NamedTuple):
    """One task on one set."""

    task: str
    set_name: str | None
    """None for tasks that have one set."""
    folder: Path


def find_all(root: Path) -> list[Item]:
    """Every task that ``root``, or a folder directly below it, holds a known set of; of a set the first that is there.

    The linear probe is of the ten sets, where a training split is known. Raises DataError where there is no set.
    """
    if not root.is_dir():
        raise DataError(f"data: {root} is no folder, where one that holds data sets is due")
    below = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found: dict[tuple[str, str | None], Item] = {}
    for folder in (root, *below):
        for task, sets_in in _FINDERS.items():
            for name in sets_in(folder):
                found.setdefault((task, name), Item(task, name, folder))
    if not found:
        raise DataError(f"data: neither {root} nor a folder directly below it holds a set that is known")
    order = list(_FINDERS)
    return sorted(found.values(), key=lambda item: order.index(item.task))


def _probed(folder: Path) -> Sequence[str]:
    return [name for name in class_sets_in(folder) if name in KNOWN and KNOWN[name].train is not None]


def _if_there(*names: str) -> Callable[[Path], Sequence[None]]:
    """The one set of a task, where all of these lie in the folder, or below its ``data``."""
    return lambda folder: (
        [None] if any(all((top / n).exists() for n in names) for top in (folder, folder / "data")) else []
    )


_FINDERS: dict[str, Callable[[Path], Sequence[str | None]]] = {
    "retrieval": caption_sets_in,
    "classification": class_sets_in,
    "linear_probe": _probed,
    "segmentation": segmentation_sets_in,
    "mmvp": _if_there("Questions.csv", MMVP_PICTURES),
    "sugarcrepe": _if_there("add_att.json"),
    "winoground": _if_there("examples.jsonl"),
    "aro": _if_there("visual_genome_relation.json"),
}
