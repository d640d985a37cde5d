#!/usr/bin/env python3
"""Measure the cost of the losses of COSMOS with many ranks: python tools/bench_loss.py [--json FILE].

The losses get 8 + 8 views. One process computes the cost of one rank of 1 to 8: its rows by the columns of all ranks.
Collectives and bytes are counted in forward and backward of two real gloo ranks, by torch.distributed's flight
recorder. It records the collectives of all threads and of all callers. Bytes are those of the output tensors. The value
of the loss is compared with the dense formula.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from baseline import info_nce as compute_dense_loss
from bench import (
    Row,
    get_printed_number,
    make_difference_row,
    make_duration_row,
    make_ratio_row,
    make_row,
    print_memory_growth,
    report,
)
from bench_step import TINY, Work
from torch import Tensor

from cosmos_ssl import functional
from cosmos_ssl.api import Progress, normalise
from cosmos_ssl.engine.forward import Forward

WORLD_SIZES = (1, 2, 4, 8)
ROWS, WIDTH = 128, 512
SAMPLES, EMBED_DIM = 8, 64
"""Of the counted step; the width is that of ``TINY``."""
ALL_VIEWS = 8 + 8 + 16 + 4 + 8 + 8 + 16
"""Views that gathering every view would move: all of them forward, the student's backward."""
SCALE = torch.tensor(14.3)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNKED_LOSS: Loss = partial(functional.info_nce, chunk=5000)


def make_features(views: int, samples: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Return random unit vectors [V, N, D]."""
    return normalise(torch.randn(views, samples, width, generator=torch.Generator().manual_seed(seed)))


def make_loss_step(world_size: int, rows: int = ROWS, width: int = WIDTH) -> Callable[[], object]:
    """Return forward and backward of both losses on one rank.

    The losses are those of 8 texts with 2 images, and of 16 cross features with 4 of the teacher.
    """
    texts = make_features(8, rows, 0, width).requires_grad_()
    cross = make_features(16, rows, 1, width).requires_grad_()
    images = make_features(2, world_size * rows, 2, width).requires_grad_()
    teacher = make_features(4, world_size * rows, 3, width)

    def run() -> None:
        loss = functional.info_nce(texts, images, SCALE) + functional.info_nce(cross, teacher, SCALE)
        loss.backward()

    return run


def measure_seconds(run: Callable[[], object], times: int) -> float:
    """Return the median time of a call."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_time(times: int, make_step: Callable[[int], Callable[[], object]] = make_loss_step) -> list[Row]:
    """Return the time of one rank by number of ranks, and its growth."""
    seconds = {world_size: measure_seconds(make_step(world_size), times) for world_size in WORLD_SIZES}
    rows = [make_duration_row(f"one rank of {size}", value, "ms", more_than=1e-3) for size, value in seconds.items()]
    growth = make_ratio_row(
        "growth to 8 ranks", seconds[8], 8 * seconds[1], "of linear", at_most=1.25, sides_more_than=1e-3
    )
    return [*rows, growth]


def measure_memory() -> list[Row]:
    """Return the memory that the losses add on one rank by number of ranks, and its growth."""
    sizes = {size: get_printed_number("bench_loss.py", "--peak-of", str(size)) / 2**20 for size in WORLD_SIZES}
    rows = [make_row(f"peak of one rank of {world_size}", size, "MiB") for world_size, size in sizes.items()]
    return [*rows, make_ratio_row("peak, 8 ranks by 1", sizes[8], sizes[1], at_most=1.25)]


# ---------------------------------------------------------------------------- collectives


def run_losses(work: Work, rank: int, world_size: int) -> None:
    """Run forward and backward of a step up to its losses on this rank's samples, without the gradient reduction."""
    work.state()
    forward, progress = Forward(work.assembly), Progress(step=0, total_steps=10)
    views = work.views.slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
    forward.tell(progress)
    teacher = forward.teacher(views)
    forward.losses(views, forward.student(views), teacher, progress).loss.backward()


def get_recorded_collectives() -> list[int]:
    """Return the output bytes of each collective that the flight recorder holds."""
    recorded = pickle.loads(torch._C._distributed_c10d._dump_fr_trace(True, False, False))  # type: ignore[attr-defined]
    return [
        sum(
            torch.Size(size).numel() * getattr(torch, f"{dtype}Tensor").dtype.itemsize
            for size, dtype in zip(entry["output_sizes"], entry["output_dtypes"], strict=True)
        )
        for entry in recorded.get("entries", [])
    ]


def count_collectives(
    rank: int, world_size: int, store: str, run: Callable[[Work, int, int], None], results: dict[int, list[int]]
) -> None:
    """Count the collectives of ``run`` on one of several ranks, as the bytes of each."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "10000"  # read once, when the process group starts
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    work = Work("vitb16", SAMPLES, torch.device("cpu"), TINY)
    dist.all_reduce(torch.zeros(1))
    before = len(get_recorded_collectives())
    if not before:
        raise RuntimeError(f"the flight recorder of PyTorch {torch.__version__} does not record gloo")
    run(work, rank, world_size)
    results[rank] = get_recorded_collectives()[before:]
    dist.destroy_process_group()


def make_collective_rows(counted: list[int]) -> list[Row]:
    """Return the rows of the collectives of one rank, given the bytes of each."""
    all_bytes = 4 * SAMPLES * EMBED_DIM * ALL_VIEWS
    return [
        make_row("collectives a step, both losses", len(counted), at_most=4),
        make_ratio_row("bytes moved", sum(counted), all_bytes, "of gathering all", at_most=0.25),
    ]


def measure_collectives() -> list[Row]:
    """Count the collectives of the losses of two ranks."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(count_collectives, args=(2, f"{folder}/store", run_losses, results), nprocs=2)
        return make_collective_rows(results[0])


# ---------------------------------------------------------------------------- the value


def measure_difference(loss: Loss = CHUNKED_LOSS) -> Row:
    """Compare the loss of a whole batch, computed in chunks, with the dense formula, pair by pair."""
    a, b = make_features(16, 96), make_features(4, 96, 1)
    dense = torch.stack([compute_dense_loss(x, y, SCALE) for x in a for y in b]).mean()
    return make_difference_row(
        "difference from dense", {"loss": float(dense)}, {"loss": float(loss(a, b, SCALE))}, at_most=1e-6
    )


def main() -> int:
    """Print a table; exit with 1 if a row fails."""
    parser = argparse.ArgumentParser(description="Benchmark of the contrastive losses over many ranks.")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        make_loss_step(1, rows=8)()
        # narrow features, so that most of the memory is that of the logits
        print_memory_growth(make_loss_step(arguments.peak_of, rows=512, width=32))
        return 0
    rows = [*measure_time(arguments.times), *measure_collectives(), *measure_memory(), measure_difference()]
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
