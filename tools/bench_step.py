#!/usr/bin/env python3
"""Compare a whole training step with a plain implementation: python tools/bench_step.py [--json FILE].

Both train the same model from the same weights on the same synthetic batch. Each runs in its own process with its own
memory and thread settings. They take turns, and speed is the median ratio of paired steps. Memory is the peak of each
process. FLOPs are those of forward and backward of student and teacher: each matrix product counts 2 m n k, those of
attention too (causal ones in full).

``--compile`` compares our step with and without ``training.compile``, on batches of changing caption lengths. The time
to compile is that of the first steps beyond what such steps take later.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from baseline import PlainCosmos, PlainStep
from bench import (
    MIN_SECONDS,
    Row,
    get_peak_memory,
    make_difference_row,
    make_duration_row,
    make_ratio_row,
    make_row,
    report,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cosmos_ssl.api import ImageGroup, Progress, TextGroup, Views
from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.config.source import find_config
from cosmos_ssl.engine.distributed import keep_freed_memory
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.engine.step import Step
from cosmos_ssl.errors import UserError

MEAN_LENGTH = 19.5
BATCHES = 4
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "vitb16": ("cosmos/vitb16_cc3m.yaml", []),
    "vitb32": ("cosmos/vitb32_cc3m.yaml", []),
    "clip": ("methods/clip.yaml", []),
}
TINY = [
    "model.image.width=64",
    "model.image.layers=2",
    "model.text.width=64",
    "model.text.layers=2",
    "model.text.heads=1",
    "model.embed_dim=64",
]


class Work:
    """One variant on one batch: our step and the plain one, from the same weights."""

    def __init__(self, variant: str, samples: int, device: torch.device, overrides: Sequence[str] = ()) -> None:
        config, own = VARIANTS.get(variant, (variant, []))
        settings = [
            f"training.batch_size={samples}",
            "training.precision=fp32",
            "schedule.warmup_steps=0",
        ]
        self.loaded = load_config(config, [*own, *settings, *overrides, "evaluators=null"])
        self.device = device
        self.assembly = Builder(self.loaded).assemble("measure")
        self.views = self._batch(samples).to(device)
        self.step_number = 0

    def state(self) -> RunState:
        """Teacher and optimiser around our model."""
        return RunState(self.assembly, self.loaded.config, self.device)

    def ours(self) -> Callable[[], dict[str, Tensor]]:
        """Our step."""
        step = Step(self.assembly, self.state(), self.loaded.config.training)

        def run() -> dict[str, Tensor]:
            progress = Progress(step=self.step_number, total_steps=1000)
            self.step_number += 1
            logs = step(self.views, progress).result.logs
            return {
                name.removeprefix("loss/"): value
                for name, value in logs.items()
                if name.count("/") == 1 and name.startswith("loss/")
            }

        return run

    def eager(self) -> Callable[[], dict[str, Tensor]]:
        """Our step on other batches, and so other lengths, each time; for ``compiled`` too, which is the config's
        affair.
        """
        step, batches = (
            self.ours(),
            cycle([self._batch(len(self.views), seed).to(self.device) for seed in range(BATCHES)]),
        )

        def run() -> dict[str, Tensor]:
            self.views = next(batches)
            return step()

        return run

    compiled = eager

    def plain(self) -> Callable[[], dict[str, Tensor]]:
        """The plain step."""
        model, heads = self.loaded.tree["model"], self.loaded.tree["heads"]
        image, text = model["image"], model["text"]
        counts = (
            image.get("heads") or image["width"] // 64,
            text.get("heads") or text["width"] // 64,
            heads["cross"]["num_heads"] if heads else 1,
        )
        student = PlainCosmos(self.assembly.model, counts, image["patch_size"]).to(self.device)
        optimizer = self.loaded.config.optimizer
        teacher = self.loaded.tree["teacher"]
        step = PlainStep(
            student,
            momentum=teacher.get("momentum_teacher", 0.999),
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
        )
        return lambda: step(self.views)

    def _batch(self, samples: int, seed: int = 0) -> Views:
        """Random pictures, and captions of ``MEAN_LENGTH`` tokens on average."""
        generator = torch.Generator().manual_seed(seed)
        spec = self.assembly.spec
        image, text = {}, {}
        for name, view in spec.image_views.items():
            pixels = torch.randn(view.views, samples, 3, view.size or 0, view.size or 0, generator=generator)
            image[name] = ImageGroup(pixels=pixels, params=torch.empty(view.views, samples, 0))
        for name, view in spec.text_views.items():
            spread = torch.randn(view.views, samples, generator=generator) * 6
            lengths = (MEAN_LENGTH + spread - spread.mean()).round().long().clamp(3, spec.context_length)
            tokens = torch.randint(1, 49_000, (view.views, samples, spec.context_length), generator=generator)
            ends = torch.arange(spec.context_length) - lengths[..., None] + 1
            tokens = tokens.masked_fill(ends > 0, 0).masked_fill(ends == 0, 49_407)
            text[name] = TextGroup(tokens=tokens, lengths=lengths)
        return Views(keys=[str(n) for n in range(samples)], image=image, text=text)


def count_flops(step: Callable[[], Any]) -> float:
    """Return the FLOPs of one step."""
    cpu = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )

    def forward(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    with FlopCounterMode(display=False, custom_mapping={cpu[0]: forward, cpu[1]: backward}) as counter:
        step()
    return float(counter.get_total_flops())


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def respond(request: str, step: Callable[[], dict[str, Tensor]], device: torch.device) -> Any:
    """Run a ``step`` (returns seconds and losses), count its ``flops``, or return the ``peak`` of memory."""
    if request == "step":
        synchronize(device)
        start = time.perf_counter()
        losses = step()
        synchronize(device)
        return time.perf_counter() - start, {name: float(loss) for name, loss in losses.items()}
    if request == "flops":
        return count_flops(step)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else get_peak_memory()


class StepProcess:
    """One implementation of the step, in a process that responds to requests on its standard input."""

    def __init__(self, side: str, options: Sequence[str]) -> None:
        command = [sys.executable, __file__, "--side", side, *options]
        environment = os.environ | ({"GOMP_SPINCOUNT": "1000"} if side != "plain" else {})  # as cosmos-launch sets it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def request(self, request: str) -> Any:
        """Send a request and return the response. Raises SystemExit if the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(request, file=self.process.stdin, flush=True)
        response = self.process.stdout.readline()
        if not response:
            raise SystemExit(f"the process ended: {self.process.args}")
        return json.loads(response)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def run_requests(variant: str, samples: int, side: str, device: torch.device, overrides: Sequence[str]) -> None:
    """Respond to the requests on standard input, in the process of a side."""
    if device.type == "cpu" and side != "plain":
        keep_freed_memory()  # as the trainer does
    own = ["training.compile=true"] if side == "compiled" else []
    step = getattr(Work(variant, samples, device, [*overrides, *own]), side)()
    for line in sys.stdin:
        print(json.dumps(respond(line.strip(), step, device)), flush=True)


def measure(variant: str, samples: int, pairs: int, sides: Sequence[StepProcess], *, goals: bool) -> list[Row]:
    """Return the rows of one variant; ``sides`` are the plain step and ours, ``goals`` whether speed and cost have
    bounds.
    """
    first = [side.request("step")[1] for side in sides]
    plain, ours = zip(*([side.request("step")[0] for side in sides] for _ in range(pairs)), strict=True)
    memory = [side.request("peak") for side in sides]
    flops = [side.request("flops") for side in sides]
    bound = float if goals else lambda _: None
    least = {"sides_more_than": MIN_SECONDS}
    rates = [
        make_ratio_row(f"{variant}: samples a second{name}", samples, statistics.median(seconds), "1/s", **least)
        for name, seconds in ((", plain", plain), ("", ours))
    ]
    return [
        make_ratio_row(f"{variant}: speed", plain, ours, "x plain", at_least=bound(1.6), **least),
        *rates,
        make_ratio_row(f"{variant}: FLOPs", flops[1], flops[0], "of plain", at_most=bound(0.77)),
        make_row(f"{variant}: FLOPs a sample", flops[1] / samples / 1e9, "GFLOP"),
        make_ratio_row(f"{variant}: peak memory", memory[1], memory[0], "of plain", at_most=bound(0.75)),
        make_row(f"{variant}: peak memory, absolute", memory[1] / 2**30, "GiB"),
        make_difference_row(f"{variant}: largest difference of losses", *first, at_most=1e-5),
    ]


def measure_compiled(variant: str, samples: int, pairs: int, sides: Sequence[StepProcess]) -> list[Row]:
    """Return the rows of one variant; ``sides`` are our step as it is and compiled."""
    first = [[side.request("step") for side in sides] for _ in range(BATCHES)]
    eager, compiled = zip(*([side.request("step")[0] for side in sides] for _ in range(pairs)), strict=True)
    memory = [side.request("peak") for side in sides]
    compiling = sum(step[1][0] for step in first) - BATCHES * statistics.median(compiled)
    losses = [step[1] for step in first[0]]
    return [
        make_ratio_row(f"{variant}: compiled step", compiled, eager, "of eager", sides_more_than=MIN_SECONDS),
        make_duration_row(f"{variant}: eager step", statistics.median(eager)),
        make_duration_row(f"{variant}: compiling", compiling, more_than=1),
        make_ratio_row(f"{variant}: peak memory, compiled", memory[1], memory[0], "of eager"),
        make_difference_row(f"{variant}: largest difference of losses", *losses, at_most=1e-5),
    ]


def main() -> int:
    """Print a table; exit with 1 if a row fails."""
    parser = argparse.ArgumentParser(description="Benchmark of a whole training step.")
    names = f"{', '.join(VARIANTS)}, or recipes of your own (default: these)"
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help=names)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="small towers, to see that it runs")
    parser.add_argument("--compile", action="store_true", help="measure our step compiled beside not compiled")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("plain", "ours", "eager", "compiled"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value for the configs")
    arguments = parser.parse_intermixed_args()
    device = torch.device(arguments.device)
    try:
        for name in arguments.variants:
            find_config(VARIANTS.get(name, (name, []))[0])
    except UserError as error:
        parser.error(f"--variants: {error}")
    overrides = [*(TINY if arguments.tiny else []), *arguments.overrides]
    if arguments.side:
        run_requests(arguments.variants[0], arguments.samples, arguments.side, device, overrides)
        return 0
    rows = []
    with TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what an earlier run compiled does not count
        for variant in arguments.variants:
            options = ["--variants", variant, "--samples", str(arguments.samples), "--device", device.type, *overrides]
            pair = ("eager", "compiled") if arguments.compile else ("plain", "ours")
            sides = [StepProcess(name, options) for name in pair]
            counts = (variant, arguments.samples, arguments.pairs, sides)
            if arguments.compile:
                rows += measure_compiled(*counts)
            else:
                rows += measure(*counts, goals=variant == "vitb16" and not overrides)  # the others are only reported
            for side in sides:
                side.close()
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
