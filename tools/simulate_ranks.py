#!/usr/bin/env python3
"""What one of 1,024 ranks does in a step, without the others: python tools/simulate_ranks.py [--json FILE].

Every rank takes equally many samples, so the batch grows with the ranks. The step is that of the config, on a CUDA
device that is not there and a process group in which nobody answers (PyTorch's ``fake``): what is sent and kept is
counted, nothing is computed. Bytes are those that a rank sends where collectives go round a ring, of n bytes at their
largest n (W - 1) / W, and twice that where they are added up.

How each figure may grow is what the table's unit says, judged against the fewest ranks that are more than one:

- constant: as the tensor that all ranks add up; where it is time, up to three times as much, as machines have other
  work too (growth with the ranks would be a hundredfold);
- linear: as the samples of the world, which losses over the global batch look at;
- the peak of memory: by no more than 4 times the gathered features, and 5 chunks of logits;
- launches: by no more than 50 for each further chunk of logits.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import Row, make_row, report

from cosmos_ssl.cost.fake_device import fake_device

RANKS = (1, 8, 64, 1024)
SHARD = 3300
"""Samples of a shard."""
EPOCH = 10
"""The epoch in whose midst the order is asked for a step."""
STEPS = 50
TINY = [
    "model.image.width=64",
    "model.image.layers=2",
    "model.text.width=64",
    "model.text.layers=2",
    "model.text.heads=1",
    "model.embed_dim=64",
]
CHUNK = (80 << 30) // 256
"""Bytes of logits at once on a card of 80 GiB, as ``functional.losses`` has it."""
Found = Mapping[str, float]
"""Figures of one number of ranks, by name."""


# ---------------------------------------------------------------------------- one rank, in the process with the device


def follow_order(ranks: int, samples: int, shards: int) -> dict[str, float]:
    """The order of samples of the rank in the middle: a step far in, from nothing, and those after it."""
    import numpy as np

    from cosmos_ssl.config.sections import default_lanes
    from cosmos_ssl.data import Order

    batch, own = ranks * samples, ranks // 2
    lanes = max(ranks, default_lanes(batch))

    def sought() -> tuple[Order, int, Any]:
        order = Order(np.full(shards, SHARD), batch, lanes=lanes, seed=0)
        step = EPOCH * order.steps_per_epoch + order.steps_per_epoch // 2
        return order, step, order.rank_batch(step, own, ranks)

    seeks, steps = [], []
    for _ in range(3):
        start = time.process_time()
        order, first, found = sought()
        seeks.append(time.process_time() - start)
        start = time.process_time()
        for step in range(first + 1, first + STEPS):
            order.rank_batch(step, own, ranks)
        steps.append((time.process_time() - start) / (STEPS - 1))
    tracemalloc.start()
    sought()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    share = order.batch(first)[own * samples : (own + 1) * samples]
    return {
        "order: to a step far in": 1e3 * min(seeks),
        "order: each further step": 1e3 * min(steps),
        "order: memory": peak / 2**20,
        "order: samples of the rank": len(found),
        "order: samples of others": float((found != share).sum()),
    }


def sending() -> Any:
    """A mode that counts the collectives of the host, and the bytes that they send."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_any

    from cosmos_ssl.cost.kernels import is_collective, sent

    class Sending(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.calls, self.bytes = 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if is_collective(func) and not tree_any(lambda x: isinstance(x, FakeTensor), args):
                self.calls += 1
                self.bytes += sent(func, args)
            return func(*args, **kwargs or {})

    return Sending()


def exchange_seldom(assembly: Any, ranks: int) -> dict[str, float]:
    """What ranks tell one another for a line of the log, and before a checkpoint."""
    import torch

    from cosmos_ssl.cost.card_step import fake_ranks
    from cosmos_ssl.engine.distributed import World
    from cosmos_ssl.engine.exchange import check_replicas, spread

    width = assembly.spec.embed_dim
    with fake_ranks(ranks), sending() as log:
        world = World()
        spread({"image": torch.zeros(2, width).double(), "text": torch.zeros(2, width).double()})
        world.mean({str(number): 0.0 for number in range(16)})
        world.most([0.0] * 8)
        world.slowest(1.0)
    with fake_ranks(ranks), sending() as checkpoint:
        check_replicas(assembly.model.state_dict(), lambda name: name)
    return {"log line: sent": log.bytes / 1e3, "checkpoint: sent": checkpoint.bytes / 1e3}


def count(config: str, overrides: Sequence[str], ranks: int, samples: int, shards: int) -> dict[str, float]:
    """All figures of one number of ranks."""
    from cosmos_ssl.build import Builder
    from cosmos_ssl.config import load_config
    from cosmos_ssl.cost.card_step import count_step

    fixed = ["evaluators=null", f"training.batch_size={samples * ranks}", "loader.lanes=null"]
    loaded = load_config(config, [*overrides, *fixed])
    assembly = Builder(loaded).assemble("measure")
    seldom = exchange_seldom(assembly, ranks)
    start = time.process_time()
    with sending() as host:
        step = count_step(assembly, loaded.config, samples=samples, ranks=ranks)
    seconds = time.process_time() - start
    sent = dict.fromkeys(SENT, 0)
    collectives, launches, chunks, products = 0, 0, 0, 0
    for kernel, times in step.found.kernels.items():
        launches += times * kernel.launches
        if kernel.stage == "losses":
            products += times * kernel.flops
            chunks += times * (kernel.name == "mm")
        if kernel.name.startswith("c10d"):
            collectives += times
            sent[_purpose(kernel.stage, kernel.name)] += times * kernel.sent
    steps = 2  # that count_step makes
    sent["step: agreement"] += host.bytes // steps
    return {
        **follow_order(ranks, samples, shards),
        "step: collectives": collectives + host.calls / steps,
        **{name: number / 1e6 for name, number in sent.items()},
        "step: sent in all": sum(sent.values()) / 1e6,
        "step: products of the losses": products / 1e12,
        "step: peak of the card's memory": step.peak / 2**30,
        "step: launches": launches,
        "step: chunks of logits": chunks,
        "step: host, counting included": seconds / steps,
        **seldom,
    }


def _purpose(stage: str, name: str) -> str:
    """What a collective of a stage is for; gradients are added up while the backward pass runs."""
    if "allreduce" in name:
        return {"losses": "step: sums of exponentials", "agree": "step: agreement"}.get(stage, "step: gradients")
    return "step: gathered features" if stage == "losses" else "step: gradients of the features"


# ---------------------------------------------------------------------------- how they may grow

Bound = Callable[[Found, Found, str, int, int], float]
"""Of the figures of few ranks and of many, a name, both numbers of ranks: the most that the one of many may be."""


def same(few: Found, many: Found, name: str, fewer: int, ranks: int) -> float:
    """Nothing of it may hang on the ranks."""
    return few[name]


def added(few: Found, many: Found, name: str, fewer: int, ranks: int) -> float:
    """The bytes of a tensor whose size does not: what a ring sends of it."""
    return few[name] * (1 - 1 / ranks) / (1 - 1 / fewer)


def linear(few: Found, many: Found, name: str, fewer: int, ranks: int) -> float:
    """The bytes of a tensor that has a place for each sample of the world: what a ring sends of it."""
    return few[name] * (ranks - 1) / (fewer - 1)


def by_ranks(few: Found, many: Found, name: str, fewer: int, ranks: int) -> float:
    """Work for each sample of the world."""
    return few[name] * ranks / fewer


def thrice(few: Found, many: Found, name: str, fewer: int, ranks: int) -> float:
    """Time that does not grow, on a machine with other work."""
    return 3 * few[name]


def both(few: Found, many: Found, name: str, fewer: int, ranks: int) -> float:
    """All that is sent: gradients stay, what is for the losses grows."""
    return sum(bound(few, many, part, fewer, ranks) for part, bound in SENT.items())


def peak(few: Found, many: Found, name: str, fewer: int, ranks: int) -> float:
    """Four times the gathered features, and five chunks of logits."""
    gathered = 1e6 * (many["step: gathered features"] - few["step: gathered features"])
    return few[name] + (4 * gathered + 5 * CHUNK) / 2**30


def chunked(few: Found, many: Found, name: str, fewer: int, ranks: int) -> float:
    """Fifty launches for a chunk of logits, forward and backward."""
    return few[name] + 50 * (many["step: chunks of logits"] - few["step: chunks of logits"])


SENT: Mapping[str, Bound] = {
    "step: gathered features": linear,
    "step: gradients of the features": linear,
    "step: sums of exponentials": linear,
    "step: gradients": added,
    "step: agreement": added,
}
"""All that a rank sends in a step."""
SENT_TO_NONE = {*SENT, "step: collectives", "step: sent in all", "log line: sent", "checkpoint: sent"}
"""Zero on one rank, and on no more ranks."""
MIN_DURATIONS = {"ms": 1e-3, "s": 1e-3}
"""Lower bounds of durations by unit: a call that does no work takes less."""
FIGURES: Mapping[str, tuple[str, Bound]] = {
    "order: to a step far in": ("ms, constant", thrice),
    "order: each further step": ("ms, constant", thrice),
    "order: memory": ("MiB, constant", same),
    "order: samples of the rank": ("constant", same),
    "order: samples of others": ("", same),
    "step: collectives": ("constant", same),
    **{name: (f"MB, {'linear' if bound is linear else 'constant'}", bound) for name, bound in SENT.items()},
    "step: sent in all": ("MB", both),
    "step: products of the losses": ("TFLOP, linear", by_ranks),
    "step: peak of the card's memory": ("GiB", peak),
    "step: launches": ("", chunked),
    "step: chunks of logits": ("linear", by_ranks),
    "step: host, counting included": ("s, constant", thrice),
    "log line: sent": ("kB, linear", linear),
    "checkpoint: sent": ("kB, constant", added),
}


def judged(found: Mapping[int, Found]) -> list[Row]:
    """A row for each figure and number of ranks, with its bound where there are fewer ranks to judge it by."""
    several = [ranks for ranks in found if ranks > 1]
    rows = []
    for name, (unit, bound) in FIGURES.items():
        for ranks, own in found.items():
            most = None
            if several and ranks > several[0]:
                most = 1.001 * bound(found[several[0]], own, name, several[0], ranks)  # bytes are whole numbers
            least: float | None = MIN_DURATIONS.get(unit.split(",")[0], 0.0)
            if name == "order: samples of others" or (ranks == 1 and name in SENT_TO_NONE):
                least = None
            rows.append(make_row(f"{name}, {ranks}", own[name], unit, at_most=most, more_than=least))
    return rows


def main() -> int:
    """Print a table; exit 1 where something grows faster than stated."""
    parser = argparse.ArgumentParser(description="One rank of many, counted without the others.")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--samples", type=int, default=64, help="of each rank (64)")
    parser.add_argument("--shards", type=int, default=30_000, help=f"of {SHARD:,} samples (30,000)")
    parser.add_argument("--config", default="cosmos/vitb16_cc3m.yaml")
    parser.add_argument("--tiny", action="store_true", help="small towers, to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value for the config")
    arguments = parser.parse_intermixed_args()
    overrides = [*(TINY if arguments.tiny else []), *arguments.overrides]
    with fake_device() as run:
        found = {
            ranks: run(count, arguments.config, overrides, ranks, arguments.samples, arguments.shards)
            for ranks in sorted(set(arguments.ranks))
        }
    return report(judged(found), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
