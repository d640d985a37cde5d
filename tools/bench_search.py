#!/usr/bin/env python3
"""Compare exact search with a plain product and topk: python tools/bench_search.py [--json FILE].

It searches 100,000 and 1,000,000 synthetic unit vectors of 512 numbers (2 GiB). The plain implementation is
``(x @ q).topk(50)`` of PyTorch, which takes turns with ours. ``recall`` is the share of the best 50 in double precision
that was found.
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
from bench import MIN_SECONDS, Row, make_duration_row, make_ratio_row, make_row, report
from numpy.typing import NDArray

from cosmos_ssl.search.nearest import ENGINES, Nearest, Vectors, as_vectors

SIZES, WIDTH, TOP = (100_000, 1_000_000), 512, 50
_BLOCK = 50_000


def make_vectors(rows: int, seed: int = 0) -> Vectors:
    """Return random unit vectors [rows, WIDTH]."""
    generator = np.random.default_rng(seed)
    vectors = np.empty((rows, WIDTH), np.float32)
    for start in range(0, rows, _BLOCK):
        part = vectors[start : start + _BLOCK]
        generator.standard_normal(out=part, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def find_best(vectors: Vectors, query: Vectors, k: int) -> set[int]:
    """Return the rows of the greatest products in double precision."""
    parts = (
        vectors[at : at + _BLOCK].astype(np.float64) @ query.astype(np.float64) for at in range(0, len(vectors), _BLOCK)
    )
    scores: NDArray[np.float64] = np.concatenate(list(parts))
    return set(np.argpartition(-scores, k - 1)[:k].tolist())


def measure_seconds(*searches: Callable[[Vectors], Any], queries: Vectors) -> list[float]:
    """Return the median time of each search; they take turns at each query."""
    times: list[list[float]] = [[] for _ in searches]
    for query in queries:
        for search, seconds in zip(searches, times, strict=True):
            start = time.perf_counter()
            search(query[None])
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def measure(size: int, count: int, engine: str, build: Callable[[Vectors], Nearest]) -> list[Row]:
    """Return the time of a query, its ratio to the plain implementation, and the recall."""
    vectors, queries = make_vectors(size), make_vectors(count, 1)
    ours, tensor = build(vectors), torch.from_numpy(vectors)
    k = min(TOP, size)

    def search_plain(query: Vectors) -> Any:
        return (tensor @ torch.from_numpy(query[0])).topk(k)

    for search in (search_plain, lambda query: ours.top(query, k)):
        search(as_vectors(queries[:1]))
    plain, seconds = measure_seconds(search_plain, lambda query: ours.top(query, k), queries=queries)
    checked = queries[:3]
    shares = [
        len(find_best(vectors, query, k) & set(result.rows.tolist())) / k
        for query, result in zip(checked, ours.top(checked, k), strict=True)
    ]
    name = f"{engine}, {size:,} vectors"
    most = 100.0 if size == 1_000_000 and engine == "plain" else None
    return [
        make_duration_row(f"{name}: time", seconds, "ms a query", at_most=most),
        make_duration_row(f"{name}: product and topk", plain, "ms a query"),
        make_ratio_row(f"{name}: time by that", seconds, plain, sides_more_than=MIN_SECONDS),
        make_row(f"{name}: recall", statistics.mean(shares), at_least=1.0),
    ]


def main() -> int:
    """Print a table; exit with 1 if a row fails."""
    parser = argparse.ArgumentParser(description="Benchmark of exact search.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=["plain"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        row
        for size in arguments.sizes
        for engine in arguments.engines
        for row in measure(size, arguments.queries, engine, ENGINES[engine])
    ]
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
