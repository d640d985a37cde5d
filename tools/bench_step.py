#!/usr/bin/env python3
"""A whole training step beside the plain way of doing it: python tools/bench_step.py [--json FILE].

Both train the same model from the same weights on the same synthetic batch, each in a process of its own, with the
settings of memory and threads that belong to its way; they take turns, and speed is the median ratio of paired steps.
Memory is the peak of each process. FLOPs: every matrix product at 2 m n k, attention's two and their backward passes
included (causal ones in full), forward and backward of student and teacher.

``--compile`` measures our step with ``training.compile`` beside our step without it, on batches of changing caption
lengths; the time that compiling takes is that of the first steps beyond what such steps take later.
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
from bench import Row, report, resident_peak, row
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


def flops(step: Callable[[], Any]) -> float:
    """FLOPs of one step."""
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


def synchronised(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Side:
    """One way of the step, in a process that does what it is told by lines of its input."""

    def __init__(self, side: str, options: Sequence[str]) -> None:
        command = [sys.executable, __file__, "--side", side, *options]
        environment = os.environ | ({"GOMP_SPINCOUNT": "1000"} if side != "plain" else {})  # as cosmos-launch sets it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str) -> Any:
        """Have it do ``step``, ``flops`` or ``peak``; what it answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process ended: {self.process.args}")
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def answer(variant: str, samples: int, side: str, device: torch.device, overrides: Sequence[str]) -> None:
    """The loop of a side's process."""
    if device.type == "cpu" and side != "plain":
        keep_freed_memory()  # as the trainer does
    own = ["training.compile=true"] if side == "compiled" else []
    step = getattr(Work(variant, samples, device, [*overrides, *own]), side)()
    for line in sys.stdin:
        if line.strip() == "step":
            synchronised(device)
            start = time.perf_counter()
            losses = step()
            synchronised(device)
            found: Any = time.perf_counter() - start, {name: float(loss) for name, loss in losses.items()}
        elif line.strip() == "flops":
            found = flops(step)
        else:
            found = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()
        print(json.dumps(found), flush=True)


def measure(variant: str, samples: int, pairs: int, device: torch.device, overrides: Sequence[str]) -> list[Row]:
    """The rows of one variant."""
    options = ["--variants", variant, "--samples", str(samples), "--device", device.type, *overrides]
    sides = Side("plain", options), Side("ours", options)
    first = [side.ask("step")[1] for side in sides]
    difference = max(abs(first[0][name] - first[1][name]) for name in first[0])
    times = [[side.ask("step")[0] for side in sides] for _ in range(pairs)]
    memory = [side.ask("peak") for side in sides]
    counted = [side.ask("flops") for side in sides]
    for side in sides:
        side.close()
    ratio = statistics.median(plain / ours for plain, ours in times)
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    bound = float if variant == "vitb16" and not overrides else lambda _: None  # the others are reported
    return [
        row(f"{variant}: speed", ratio, "x plain", least=bound(1.6)),
        row(f"{variant}: samples a second, plain", samples / seconds[0], "1/s"),
        row(f"{variant}: samples a second", samples / seconds[1], "1/s"),
        row(f"{variant}: FLOPs", counted[1] / counted[0], "of plain", most=bound(0.77)),
        row(f"{variant}: FLOPs a sample", counted[1] / samples / 1e9, "GFLOP"),
        row(f"{variant}: peak memory", memory[1] / memory[0], "of plain", most=bound(0.75)),
        row(f"{variant}: peak memory, absolute", memory[1] / 2**30, "GiB"),
        row(f"{variant}: largest difference of losses", difference, most=1e-5),
    ]


def measure_compiled(
    variant: str, samples: int, pairs: int, device: torch.device, overrides: Sequence[str]
) -> list[Row]:
    """The rows of one variant, compiled beside not."""
    options = ["--variants", variant, "--samples", str(samples), "--device", device.type, *overrides]
    with TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what an earlier run compiled does not count
        sides = Side("eager", options), Side("compiled", options)
        first = [[side.ask("step") for side in sides] for _ in range(BATCHES)]
        times = [[side.ask("step")[0] for side in sides] for _ in range(pairs)]
        memory = [side.ask("peak") for side in sides]
        for side in sides:
            side.close()
    (_, eager), (_, compiled) = first[0]
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    return [
        row(f"{variant}: compiled step", statistics.median(compiled / eager for eager, compiled in times), "of eager"),
        row(f"{variant}: eager step", seconds[0], "s"),
        row(f"{variant}: compiling", sum(step[1][0] for step in first) - BATCHES * seconds[1], "s"),
        row(f"{variant}: peak memory, compiled", memory[1] / memory[0], "of eager"),
        row(
            f"{variant}: largest difference of losses",
            max(abs(eager[name] - compiled[name]) for name in eager),
            most=1e-5,
        ),
    ]


def main() -> int:
    """Print a table; exit 1 where losses differ."""
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
        answer(arguments.variants[0], arguments.samples, arguments.side, device, overrides)
        return 0
    measured = measure_compiled if arguments.compile else measure
    rows = [
        line
        for variant in arguments.variants
        for line in measured(variant, arguments.samples, arguments.pairs, device, overrides)
    ]
    report(rows, arguments.json)
    return int(any(not line["ok"] for line in rows if "difference" in line["name"]))


if __name__ == "__main__":
    sys.exit(main())
