"""What an evaluation reports: a table for people, and a row in the form of the published results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cosmos_ssl.evaluation.task_names import ON_FEATURES

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

_BESIDE: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "COSMOS B/16": PUBLISHED["cosmos_vitb16_merged30m"],
    "OpenCLIP B/16": {
        "imagenet": {"top1": 70.23},
        "imagenet_v2": {"top1": 62.28},
        "imagenet_a": {"top1": 38.23},
        "imagenet_r": {"top1": 80.61},
        "imagenet_sketch": {"top1": 56.08},
        "objectnet": {"top1": 55.98},
        "cifar10": {"top1": 94.94},
        "cifar100": {"top1": 76.84},
        "food101": {"top1": 86.63},
        "cars": {"top1": 88.48},
        "coco_karpathy": {"image_to_text_R@1": 59.44, "text_to_image_R@1": 42.31},
        "flickr30k": {"image_to_text_R@1": 86.30, "text_to_image_R@1": 69.84},
    },
    "SigLIP B/16": {
        "imagenet": {"top1": 76.04},
        "imagenet_v2": {"top1": 68.93},
        "imagenet_a": {"top1": 45.41},
        "imagenet_r": {"top1": 90.30},
        "imagenet_sketch": {"top1": 67.92},
        "objectnet": {"top1": 55.09},
        "cifar10": {"top1": 92.34},
        "cifar100": {"top1": 72.23},
        "food101": {"top1": 91.62},
        "cars": {"top1": 90.81},
        "coco_karpathy": {"image_to_text_R@1": 65.74, "text_to_image_R@1": 47.78},
        "flickr30k": {"image_to_text_R@1": 89.10, "text_to_image_R@1": 74.68},
    },
}
"""What stands beside ``--task all``, zero-shot, in percent. COSMOS: ``cosmos_vitb16_merged30m`` above. The others are
OpenCLIP's own figures (mlfoundations/open_clip, docs/openclip_results.csv and docs/openclip_retrieval_results.csv) of
``ViT-B-16, laion2b_s34b_b88k`` and ``ViT-B-16-SigLIP, webli``; what these do not tell, or of other splits, is blank.
"""
_MAIN = {
    "retrieval": tuple(f"{fold}{way}_R@1" for fold in ("", "1k/") for way in ("image_to_text", "text_to_image")),
    **dict.fromkeys(("classification", "knn", "linear_probe", "attentive_probe"), ("top1",)),
    "segmentation": ("miou",),
    "winoground": ("text_score", "image_score", "group_score"),
    "aro": ("accuracy/relation", "accuracy/attribution"),
}

_BACKGROUND = "the words for the background are our own, not SCLIP's; --class-names takes a file of others"
_NOTES = {
    "voc21": _BACKGROUND,
    "coco_object": _BACKGROUND,
    "sun397": "all pictures are evaluated on, since the reader has no split",
    "caltech101": "all pictures are evaluated on, those of the background class too, since the reader has no split",
    "aro": "all relations count; figures that leave out symmetric ones are of fewer",
    "attentive_probe": "a query for each head on patch tokens, 20 epochs of AdamW without augmentation; the learning "
    "rate, one of 3, was chosen on a fifth of the training samples",
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
        cells = ("-" if value is None else shown(name, value) for value in values)
        rows.append((name if is_rank(name) else f"{name} (%)", *cells))
    return rows


def is_rank(name: str) -> bool:
    """Return whether a metric is a rank; the others are shares."""
    return name.endswith("_rank")


def shown(name: str, value: float) -> str:
    """A metric's value as tables have it: shares in percent."""
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


def suite_rows(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table of ``--task all``: the main metrics of each set, ours and what is published, blank elsewhere."""
    roles = list(dict.fromkeys(role for report in reports for role in report["roles"]))
    rows: list[tuple[str, ...]] = [("TASK", "SET", "METRIC (%)", *(role.upper() for role in roles), *_BESIDE)]
    for report in reports:
        task, name, metrics = report["task"], report["set"], report["metrics"]
        for metric in _MAIN.get(task, ("accuracy",)):
            ours = [metrics.get(f"{role}/{metric}") for role in roles]
            if ours == [None] * len(roles):
                continue
            of_task = {} if task in ON_FEATURES else _BESIDE
            theirs = [of_task.get(model, {}).get(name, {}).get(metric) for model in _BESIDE]
            cells = ["" if value is None else f"{100 * value:.2f}" for value in ours]
            rows.append((task, name, metric, *cells, *("" if value is None else f"{value:.1f}" for value in theirs)))
    return rows


def notes(task: str, set_name: str) -> list[str]:
    """Return what must be said beside the figures of a task on a set."""
    return [_NOTES[key] for key in (task, set_name) if key in _NOTES]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"
