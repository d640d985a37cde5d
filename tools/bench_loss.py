#!/usr/bin/env python3
"""The cost of the losses of COSMOS in a world of many ranks: python tools/bench_loss.py [--json FILE].

8 + 8 views. Costs of one rank in worlds of 1 to 8 are those of its rows against everybody's columns, which one
process can compute; collectives and bytes are counted in a step of two real gloo ranks; the value is compared
with the dense formula. Bytes are those of the tensors that a collective fills, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from baseline import info_nce as one_pair
from bench import Row, number_of, print_growth, report, row
from bench_step import TINY, Work
from torch import Tensor

from cosmos_ssl import functional
from cosmos_ssl.api import Progress, normalise
from cosmos_ssl.engine.step import Gradients

WORLDS = (1, 2, 4, 8)
ROWS, WIDTH = 128, 512
SCALE = torch.tensor(14.3)


def unit(views: int, samples: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Random unit vectors [V, N, D]."""
    return normalise(torch.randn(views, samples, width, generator=torch.Generator().manual_seed(seed)))


def both(world: int, rows: int = ROWS, width: int = WIDTH) -> Callable[[], Tensor]:
    """Both losses on one rank of a world, forward and backward: 8 texts with 2 images, 16 cross features with 4 of the
    teacher.
    """
    texts, cross = unit(8, rows, 0, width).requires_grad_(), unit(16, rows, 1, width).requires_grad_()
    images, teacher = unit(2, world * rows, 2, width).requires_grad_(), unit(4, world * rows, 3, width)

    def run() -> Tensor:
        loss = functional.info_nce(texts, images, SCALE) + functional.info_nce(cross, teacher, SCALE)
        loss.backward()
        return loss.detach()

    return run


def seconds(run: Callable[[], Any], times: int = 5) -> float:
    """Median time of a call."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


class Counting:
    """Stands for ``torch.distributed`` in ``functional`` and counts what goes through."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(dist, name)
        if name not in (
            "all_reduce",
            "all_gather_single",
            "all_gather_into_tensor",
            "reduce_scatter_single",
            "reduce_scatter_tensor",
        ):
            return function

        def counted(tensor: Tensor, *rest: Any, **options: Any) -> Any:
            self.calls += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return function(tensor, *rest, **options)

        return counted


def one_rank(rank: int, world: int, store: str, results: Any) -> None:
    """A step of a small COSMOS on one of several ranks, counted."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    work = Work("vitb16", 8, torch.device("cpu"), TINY)
    work.state()
    counting = Counting()
    functional.dist = counting  # type: ignore[assignment]
    share = work.views.slice(rank * 8 // world, (rank + 1) * 8 // world)
    Gradients(work.assembly)(share, Progress(step=0, total_steps=10))
    results[rank] = (counting.calls, counting.bytes)
    dist.destroy_process_group()


def collectives() -> list[Row]:
    """Collectives of a step of two ranks, and their bytes as a share of those that gathering every view would move."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(one_rank, args=(2, f"{folder}/store", results), nprocs=2)
        calls, moved = results[0]
    width, samples = 64, 8
    view = 4 * samples * width  # one view of all ranks
    everything = view * (8 + 8 + 16 + 4) + view * (8 + 8 + 16)  # forward all, backward the student's
    return [
        row("collectives a step, both losses", calls, most=4),
        row("bytes moved", moved / everything, "of gathering all", most=0.25),
    ]


def difference() -> float:
    """From the dense formula, pair by pair, of the whole batch."""
    a, b = unit(16, 96), unit(4, 96, 1)
    found = functional.info_nce(a, b, SCALE, chunk=5000)
    return abs(float(found - torch.stack([one_pair(x, y, SCALE) for x in a for y in b]).mean()))


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Benchmark of the contrastive losses over many ranks.")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        both(1, rows=8)()
        print_growth(both(arguments.peak_of, rows=512, width=32))  # narrow: what is left are the logits
        return 0
    costs = {world: seconds(both(world), arguments.times) for world in WORLDS}
    memory = {world: number_of("bench_loss.py", "--peak-of", str(world)) for world in WORLDS}
    rows = [row(f"one rank of {world}", 1e3 * cost, "ms") for world, cost in costs.items()]
    rows.append(row("growth to 8 ranks", costs[8] / costs[1] / 8, "of linear", most=1.25))
    rows += collectives()
    rows += [row(f"peak of one rank of {world}", size / 2**20, "MiB") for world, size in memory.items()]
    rows.append(row("peak, 8 ranks by 1", memory[8] / memory[1], "x", most=1.25))
    rows.append(row("difference from dense", difference(), most=1e-6))
    report(rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
