"""What an evaluation reports: a table for people, and a row in the form of the published results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_RELEASED = {
    "cosmos_vitb16_cc3m": (53.1, 40.1, 84.1, 68.6, 37.1),
    "cosmos_vitb16_cc12m": (64.2, 48.9, 91.4, 76.2, 51.4),
    "cosmos_vitb16_yfcc15m": (67.5, 50.9, 92.6, 79.6, 52.4),
    "cosmos_vitb16_merged30m": (68.0, 52.5, 92.9, 80.3, 57.6),
    "cosmos_vitb16_pixelprose": (62.4, 43.4, 89.9, 73.6, 59.6),
    "cosmos_vitb32_cc3m": (47.6, 33.5, 74.3, 59.2, 33.0),
    "cosmos_vitb32_cc12m": (59.6, 43.0, 86.5, 69.8, 46.7),
    "cosmos_vitb32_yfcc15m": (64.5, 46.0, 90.2, 73.3, 48.1),
    "cosmos_vitb32_merged30m": (64.3, 48.4, 89.9, 76.1, 53.4),
    "cosmos_vitb32_pixelprose": (57.2, 38.9, 85.6, 66.3, 54.3),
}
_SEGMENTATION = {
    "voc20": 77.7,
    "context59": 33.7,
    "coco_object": 31.3,
    "coco_stuff": 23.2,
    "cityscapes": 34.7,
    "ade20k": 17.7,
}

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    name: {
        "coco": {"image_to_text_R@1": coco_i2t, "text_to_image_R@1": coco_t2i},
        "flickr30k": {"image_to_text_R@1": flickr_i2t, "text_to_image_R@1": flickr_t2i},
        "imagenet": {"top1": imagenet},
        **({key: {"miou": value} for key, value in _SEGMENTATION.items()} if name == "cosmos_vitb16_merged30m" else {}),
    }
    for name, (coco_i2t, coco_t2i, flickr_i2t, flickr_t2i, imagenet) in _RELEASED.items()
}
"""Checkpoint -> set -> metric -> published value in percent (arXiv 2412.01814, tables 1 to 3 and the authors' README).
"""

_BACKGROUND = "the words for the background are our own, not SCLIP's; --class-names takes a file of others"
_NOTES = {
    "voc21": _BACKGROUND,
    "coco_object": _BACKGROUND,
    "sun397": "all pictures are evaluated on, since the reader has no split",
    "caltech101": "all pictures are evaluated on, those of the background class too, since the reader has no split",
    "linear_probe": "logistic regression (L-BFGS) on standardised features before the projection; the penalty, one of "
    "13 from 1 to 1e-6, was chosen on a fifth of the training samples",
}


def metric_rows(metrics: Mapping[str, float]) -> list[tuple[str, ...]]:
    """``ROLE/NAME`` -> value as rows of a table: a metric a row, a role a column; shares in percent."""
    roles = list(dict.fromkeys(name.partition("/")[0] for name in metrics))
    names = list(dict.fromkeys(name.partition("/")[2] for name in metrics))
    rows: list[tuple[str, ...]] = [("METRIC", *(role.upper() for role in roles))]
    for name in names:
        values = (metrics.get(f"{role}/{name}") for role in roles)
        shown = ("-" if value is None else _shown(name, value) for value in values)
        rows.append((name if is_rank(name) else f"{name} (%)", *shown))
    return rows


def is_rank(name: str) -> bool:
    """Return whether a metric is a rank; the others are shares."""
    return name.endswith("_rank")


def _shown(name: str, value: float) -> str:
    return f"{value:.1f}" if is_rank(name) else f"{100 * value:.2f}"


def markdown(checkpoint: str, set_name: str, metrics: Mapping[str, float]) -> str:
    """A markdown table with the published row above ours, or an empty string where nothing is published for this."""
    published = PUBLISHED.get(checkpoint, {}).get(set_name)
    if published is None:
        return ""
    roles = list(dict.fromkeys(name.partition("/")[0] for name in metrics))
    lines = [
        ("", *(f"{set_name} {name} (%)" for name in published)),
        ("---",) * (len(published) + 1),
        (
            f"{checkpoint}, published (the better of student and teacher)",
            *(f"{value:.1f}" for value in published.values()),
        ),
    ]
    lines += [
        (f"{checkpoint}, {role}", *(f"{100 * metrics[f'{role}/{name}']:.1f}" for name in published)) for role in roles
    ]
    return "".join(_line(cells) for cells in lines)


def notes(task: str, set_name: str) -> list[str]:
    """Return what must be said beside the figures of a task on a set."""
    return [_NOTES[key] for key in (task, set_name) if key in _NOTES]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"
