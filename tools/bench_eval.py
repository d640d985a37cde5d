#!/usr/bin/env python3
"""Retrieval metrics at COCO's size beside sorting every row: python tools/bench_eval.py [--json FILE]."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import number_of, print_growth, report, row
from torch import Tensor

from cosmos_ssl.api import normalise
from cosmos_ssl.evaluation.retrieval import retrieval_metrics

IMAGES, TEXTS_AN_IMAGE, WIDTH = 5000, 5, 512


def features(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images and texts that resemble those of their image, and the owners."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, WIDTH, generator=generator)
    owners = torch.arange(images).repeat_interleave(TEXTS_AN_IMAGE)
    y = 0.15 * x[owners] + torch.randn(len(owners), WIDTH, generator=generator)
    return normalise(x), normalise(y), owners


def plain(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    """The whole matrix of scores, every row and every column sorted."""
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


def timed(function: Any, *inputs: Tensor) -> tuple[Mapping[str, float], float]:
    """Call a function; its result, and the seconds it took."""
    start = time.perf_counter()
    return function(*inputs), time.perf_counter() - start


def main() -> int:
    """Print a table; exit 1 where results differ."""
    parser = argparse.ArgumentParser(description="Benchmark of retrieval metrics.")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", choices=("plain", "ours"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    inputs = features(arguments.images)
    if arguments.peak_of:
        print_growth(lambda: (plain if arguments.peak_of == "plain" else retrieval_metrics)(*inputs))
        return 0
    retrieval_metrics(*features(64))
    expected, slow = timed(plain, *inputs)
    found, fast = min((timed(retrieval_metrics, *inputs) for _ in range(3)), key=lambda pair: pair[1])
    memory = {
        side: number_of("bench_eval.py", "--peak-of", side, "--images", str(arguments.images)) / 2**20
        for side in ("plain", "ours")
    }
    worst = max(abs(found[name] - expected[name]) for name in expected)
    rows = [
        row("speed", slow / fast, "x sorting", least=20),
        row("sorting, time", slow, "s"),
        row("ours, time", fast, "s"),
        row("largest difference", worst, most=1e-9),
        row("memory added", memory["ours"], "MiB", most=256),
        row("sorting, memory added", memory["plain"], "MiB"),
    ]
    report(rows, arguments.json)
    return int(worst > 1e-9)


if __name__ == "__main__":
    sys.exit(main())
