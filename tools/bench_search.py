#!/usr/bin/env python3
"""Exact search beside a plain product and topk: python tools/bench_search.py [--json FILE].

Synthetic unit vectors, 100,000 and 1,000,000 of 512 numbers (2 GiB); the plain way is ``(x @ q).topk(50)`` of
PyTorch, timed in turns with ours. ``recall`` is the share of the best 50 in double precision that was found.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Row, report, row
from numpy.typing import NDArray

from cosmos_ssl.search.nearest import ENGINES, Vectors, as_vectors

SIZES, WIDTH, TOP = (100_000, 1_000_000), 512, 50
_BLOCK = 50_000


def synthetic(rows: int, seed: int = 0) -> Vectors:
    """Random unit vectors [rows, WIDTH], made block by block."""
    generator = np.random.default_rng(seed)
    found = np.empty((rows, WIDTH), np.float32)
    for start in range(0, rows, _BLOCK):
        part = found[start : start + _BLOCK]
        generator.standard_normal(out=part, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return found


def best(vectors: Vectors, query: Vectors, k: int) -> set[int]:
    """The rows of the greatest products in double precision."""
    parts = (
        vectors[at : at + _BLOCK].astype(np.float64) @ query.astype(np.float64) for at in range(0, len(vectors), _BLOCK)
    )
    scores: NDArray[np.float64] = np.concatenate(list(parts))
    return set(np.argpartition(-scores, k - 1)[:k].tolist())


def seconds(*ways: Callable[[Vectors], Any], queries: Vectors) -> list[float]:
    """The median time of each way, which take turns at each query."""
    found: list[list[float]] = [[] for _ in ways]
    for query in queries:
        for way, times in zip(ways, found, strict=True):
            start = time.perf_counter()
            way(query[None])
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


def measured(size: int, queries: int, engine: str) -> list[Row]:
    """Milliseconds a query, the ratio to the plain way, and recall."""
    vectors, asked = synthetic(size), synthetic(queries, 1)
    ours, tensor = ENGINES[engine](vectors), torch.from_numpy(vectors)
    k = min(TOP, size)

    def plain(query: Vectors) -> Any:
        return (tensor @ torch.from_numpy(query[0])).topk(k)

    for way in (plain, lambda query: ours.top(query, k)):
        way(as_vectors(asked[:1]))
    slow, fast = seconds(plain, lambda query: ours.top(query, k), queries=asked)
    checked = asked[:3]
    shares = [
        len(best(vectors, query, k) & set(found.rows.tolist())) / k
        for query, found in zip(checked, ours.top(checked, k), strict=True)
    ]
    name = f"{engine}, {size:,} vectors"
    limit = {"most": 100.0} if size == 1_000_000 and engine == "plain" else {}
    return [
        row(f"{name}: time", fast * 1e3, "ms a query", **limit),
        row(f"{name}: product and topk", slow * 1e3, "ms a query"),
        row(f"{name}: time by that", fast / slow, "x"),
        row(f"{name}: recall", statistics.mean(shares), least=1.0),
    ]


def main() -> int:
    """Print a table; exit 1 where something was not found."""
    parser = argparse.ArgumentParser(description="Benchmark of exact search.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=["plain"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        line
        for size in arguments.sizes
        for engine in arguments.engines
        for line in measured(size, arguments.queries, engine)
    ]
    report(rows, arguments.json)
    return int(any(line["value"] < 1 for line in rows if line["name"].endswith("recall")))


if __name__ == "__main__":
    sys.exit(main())
