#!/usr/bin/env python3
"""Compare retrieval metrics at COCO's size with sorting every row: python tools/bench_eval.py [--json FILE]."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from bench import (
    MIN_SECONDS,
    Row,
    get_printed_number,
    make_difference_row,
    make_duration_row,
    make_ratio_row,
    make_row,
    print_memory_growth,
    report,
)
from torch import Tensor

from cosmos_ssl.api import normalise
from cosmos_ssl.evaluation.retrieval import retrieval_metrics

IMAGES, TEXTS_AN_IMAGE, WIDTH = 5000, 5, 512


Metrics = Callable[[Tensor, Tensor, Tensor], Mapping[str, float]]


def make_features(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit vectors of images and texts that resemble those of their image, and the owners."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, WIDTH, generator=generator)
    owners = torch.arange(images).repeat_interleave(TEXTS_AN_IMAGE)
    y = 0.15 * x[owners] + torch.randn(len(owners), WIDTH, generator=generator)
    return normalise(x), normalise(y), owners


def compute_plain_metrics(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    """Sort every row and every column of the whole matrix of scores."""
    scores = images @ texts.T
    owner = owners.numpy()
    found: dict[str, list[int]] = {"image_to_text": [], "text_to_image": []}
    for number, scored in enumerate(scores):
        order = owner[torch.argsort(scored, descending=True, stable=True).numpy()]
        found["image_to_text"].append(int(np.flatnonzero(order == number)[0]))
    for number, column in enumerate(scores.T):
        order = torch.argsort(column, descending=True, stable=True).numpy()
        found["text_to_image"].append(int(np.flatnonzero(order == owner[number])[0]))
    metrics = {}
    for name, ranks in found.items():
        metrics[f"{name}_mean_rank"] = float(np.mean(ranks)) + 1
        metrics[f"{name}_median_rank"] = float(np.floor(np.median(ranks))) + 1
        metrics |= {f"{name}_R@{k}": float(np.mean(np.array(ranks) < k)) for k in (1, 5, 10)}
    return metrics


def measure_call(function: Metrics, *inputs: Tensor) -> tuple[Mapping[str, float], float]:
    """Call a function; return its result and the seconds that it took."""
    start = time.perf_counter()
    return function(*inputs), time.perf_counter() - start


def measure_metrics(images: int, metrics: Metrics = retrieval_metrics) -> list[Row]:
    """Compare the speed and the values of ``metrics`` with those of sorting."""
    inputs = make_features(images)
    metrics(*make_features(64))
    expected, slow = measure_call(compute_plain_metrics, *inputs)
    measured, fast = min((measure_call(metrics, *inputs) for _ in range(3)), key=lambda pair: pair[1])
    return [
        make_ratio_row("speed", slow, fast, "x sorting", at_least=20, sides_more_than=MIN_SECONDS),
        make_duration_row("sorting, time", slow),
        make_duration_row("ours, time", fast),
        make_difference_row("largest difference", expected, measured, at_most=1e-9),
    ]


def measure_memory(images: int) -> list[Row]:
    """Measure the memory that each side adds to a process of its own."""
    plain, ours = (
        get_printed_number("bench_eval.py", "--peak-of", side, "--images", str(images)) / 2**20 for side in FUNCTIONS
    )
    return [make_row("memory added", ours, "MiB", at_most=256), make_row("sorting, memory added", plain, "MiB")]


FUNCTIONS: Mapping[str, Metrics] = {"plain": compute_plain_metrics, "ours": retrieval_metrics}


def main() -> int:
    """Print a table; exit with 1 if a row fails."""
    parser = argparse.ArgumentParser(description="Benchmark of retrieval metrics.")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", choices=tuple(FUNCTIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        inputs = make_features(arguments.images)
        print_memory_growth(lambda: FUNCTIONS[arguments.peak_of](*inputs))
        return 0
    return report([*measure_metrics(arguments.images), *measure_memory(arguments.images)], arguments.json)


if __name__ == "__main__":
    sys.exit(main())
