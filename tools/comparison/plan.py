"""What is compared: methods, what they are trained on and for how long, what that costs, and the runs of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosmos_ssl.api import Role

ROLES: tuple[Role, ...] = ("student", "teacher")
LABELS = {
    "clip": "CLIP",
    "siglip": "SigLIP",
    "clip_texts": "CLIP, all texts",
    "clip_multi_crop": "CLIP + multi-crop",
    "silc": "SILC",
    "cosmos": "COSMOS",
    "cosmos_fast": "COSMOS fast",
}
"""Recipes of configs/compare/, and what tables call them."""
FIGURES = {
    "image_to_text_R@1": "retrieval, image to text R@1",
    "image_to_text_R@5": "retrieval, image to text R@5",
    "text_to_image_R@1": "retrieval, text to image R@1",
    "text_to_image_R@5": "retrieval, text to image R@5",
    "top1": "classification, top-1",
    "miou": "segmentation, mIoU",
    "similarity_peak": "similarity peak on the named object",
    "attention_peak": "attention peak on the named object",
    "attention_peak_left_out": "attention peak on the only object not named",
    "any_patch": "any patch on the object, by chance",
}
"""Shares, in per cent."""
RANKS = {
    "image_to_text_mean_rank": "mean rank, image to text",
    "text_to_image_mean_rank": "mean rank, text to image",
}
RESULT = "comparison.json"
"""In a run's folder: its figures."""
_POLL_SECONDS = 1.0
_DRAWN = 512
"""Samples whose views tell how long the texts are that a recipe draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all methods are trained on, and what other data their settings are chosen on."""

    overrides: tuple[str, ...]
    """Of every run."""
    trial: tuple[str, ...]
    """Further ones of a run that settings are chosen by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A recipe, how it differs, what it is trained for, and what that costs."""

    key: str
    label: str
    recipe: str
    overrides: tuple[str, ...]
    epochs: int
    epoch_samples: int
    flops: float
    """Of training, per sample."""

    @property
    def samples(self) -> int:
        """Of all epochs."""
        return self.epochs * self.epoch_samples

    @property
    def total(self) -> float:
        """FLOPs of all its training."""
        return self.flops * self.samples

    def for_flops(self, flops: float, **changed: str) -> Method:
        """The same in as many whole epochs as cost about ``flops``, at least one."""
        return replace(self, epochs=max(1, round(flops / self.flops / self.epoch_samples)), **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A method with one seed. Its figures lie in its folder, beside which ``log`` is what its process prints."""

    method: Method
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        """The file into which its process prints."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    @property
    def figures(self) -> dict[str, float]:
        """What it has reached."""
        return dict(json.loads((self.folder / RESULT).read_text()))

    def flops(self) -> float:
        """FLOPs done so far, as far as it has told."""
        path = self.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        epochs = next((row["epoch"] for row in reversed(rows) if "epoch" in row), 0)
        return float(self.method.total * epochs / self.method.epochs)

    def start(self, program: str) -> subprocess.Popen[bytes]:
        """Its process, on one core."""
        self.folder.mkdir(parents=True, exist_ok=True)
        epochs = self.method.epochs
        command = [sys.executable, program, "--run", self.method.recipe, str(self.folder), *self.method.overrides]
        command += [f"training.seed={self.seed}", f"schedule.epochs={epochs}"]
        command += [f"evaluators.retrieval.every_epochs={math.ceil(epochs / 4)}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def scenes(samples: int | None, held_out: int | None = None) -> Setting:
    """Procedural scenes, so many of them to train and to compare on (default: as the recipes say); trials have
    others.
    """
    given = {"train_samples": samples, "validation_samples": held_out}
    overrides = tuple(f"data.{key}={value}" for key, value in given.items() if value is not None)
    return Setting(overrides=overrides, trial=("data.seed=7",))


def real(pattern: str, held_out: str) -> Setting:
    """Pictures of shards; trials train on all shards but the last and are judged on that.

    Raises SystemExit for a single shard.
    """
    from cosmos_ssl.data.scan import expand

    *most, last = expand(pattern)
    if not most:
        raise SystemExit(f"--shards {pattern}: settings are chosen on the last shard, so give at least two")
    data = ("data.type=webdataset", f"data.train_data={pattern}", f"evaluators.retrieval.data={held_out}")
    chosen = (f"data.train_data={'::'.join(most)}", f"evaluators.retrieval.data={last}")
    return Setting(overrides=data, trial=chosen)


def make_method(key: str, label: str, recipe: str, overrides: Sequence[str]) -> Method:
    """A recipe of configs/compare/ with what it costs: FLOPs of a step on texts as long as those that it draws, in the
    mean over the run where losses rest for a part of it.
    """
    from cosmos_ssl.api import Progress
    from cosmos_ssl.build import Builder
    from cosmos_ssl.config import load_config
    from cosmos_ssl.cost.step_cost import measure_step
    from cosmos_ssl.engine.assembly import make_loader, make_order, total_steps

    loaded = load_config(f"compare/{recipe}.yaml", overrides)
    config = loaded.config
    assembly = Builder(loaded).assemble("train")
    assert assembly.dataset is not None
    order = make_order(config, assembly.dataset.shard_sizes)
    alone = config.model_copy(update={"loader": config.loader.model_copy(update={"workers": 0})})
    loader = make_loader(assembly, alone, order, rank=0, world=1, pin=False)
    steps = min(math.ceil(_DRAWN / config.training.batch_size), order.steps_per_epoch)
    groups = [group for batch in loader.batches(0, steps) for group in batch.views.text.values()]
    tokens = sum(int(group.lengths.sum()) for group in groups) / sum(group.lengths.numel() for group in groups)
    whole = total_steps(config, order)
    plans = Counter(assembly.resting(Progress(step=step, total_steps=whole)) for step in range(whole))
    costs = {
        resting: measure_step(assembly, config, caption_tokens=tokens, resting=resting).flops["total"]
        for resting in plans
    }
    return Method(
        key=key,
        label=label,
        recipe=recipe,
        overrides=tuple(overrides),
        epochs=config.schedule.epochs,
        epoch_samples=order.steps_per_epoch * config.training.batch_size,
        flops=sum(count * costs[resting] for resting, count in plans.items()) / whole,
    )


def of_equal_cost(method: Method, most: Method) -> Method:
    """``method`` trained until it has cost what ``most`` costs."""
    longer = method.for_flops(most.total)
    times = longer.epochs / method.epochs
    return replace(longer, key=f"{method.key}_longer", label=f"{method.label}, {times:.2g} x samples")


def run_all(runs: Sequence[Run], jobs: int, program: str) -> float:
    """Make all runs that are not made, ``jobs`` at a time, the longest first; the hours that it took.

    Raises SystemExit where one fails.
    """
    from cosmos_ssl.cli.progress import stages

    began = time.monotonic()
    waiting = sorted(runs, key=lambda run: -run.method.total)
    total = sum(run.method.total for run in runs)
    live: dict[Run, subprocess.Popen[bytes]] = {}
    try:
        with stages() as told:
            while waiting or live:
                while waiting and len(live) < jobs:
                    run = waiting.pop(0)
                    live[run] = run.start(program)
                time.sleep(_POLL_SECONDS)
                for run in [run for run, process in live.items() if process.poll() is not None]:
                    if live.pop(run).returncode:
                        raise SystemExit(f"{run.folder} failed; {run.log} ends with:\n{run.log.read_text()[-1000:]}")
                    print(f"{run.folder}: done, {len(waiting) + len(live)} more to go", file=sys.stderr)
                told("GFLOP of training", round(sum(run.flops() for run in runs) / 1e9), round(total / 1e9))
    finally:
        for process in live.values():
            process.terminate()  # it saves, and goes on from there next time
        for process in live.values():
            process.wait()
    return (time.monotonic() - began) / 3600
