#!/usr/bin/env python3
"""CLIP, CLIP with multi-crop and COSMOS on procedural scenes: python tools/compare_methods.py [--json FILE].

Equal towers, data, optimiser, schedule and number of samples (configs/compare/); several seeds of each. A run is trained and
evaluated by a process of its own on one core, ``--jobs`` of them side by side. The same command again goes on: finished runs
are neither trained nor evaluated again.

What is measured, on validation scenes that no run trains on, in per cent:

- retrieval: R@1 and R@5 of the scene's caption among those of all validation scenes, and of the picture among all.
- classification: which of the 64 classes (colour and shape) the large object is, zero-shot, by the text "a large NAME".
- segmentation: zero-shot mIoU over the 64 classes of the pixels of objects, by SCLIP's protocol with one window and "a NAME".
- similarity peak: how often the patch most similar to the text "a NAME" lies on that object, for each object of each scene.
- attention peak: the same of the patch that COSMOS's cross-attention head looks at most for that text; CLIP has no such head.

A patch lies on an object if the exact mask has a pixel of the object there; ``chance`` is how often any patch does.
Every method keeps a moving average of its weights (``teacher``), which only COSMOS learns from.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

METHODS = {"clip": "CLIP", "clip_multi_crop": "CLIP + multi-crop", "cosmos": "COSMOS"}
ROLES = ("student", "teacher")
FIGURES = {
    "image_to_text_R@1": "retrieval, image to text R@1",
    "image_to_text_R@5": "retrieval, image to text R@5",
    "text_to_image_R@1": "retrieval, text to image R@1",
    "text_to_image_R@5": "retrieval, text to image R@5",
    "top1": "classification, top-1",
    "miou": "segmentation, mIoU",
    "similarity_peak": "similarity peak on the named object",
    "attention_peak": "attention peak on the named object",
}
CAPTION_TOKENS = 17.0
"""Mean length of the texts of these configs, for FLOPs: half of them join one to three sentences of 12.5 tokens."""
QUICK = (
    "model.embed_dim=32",
    "model.image.width=64",
    "model.image.layers=1",
    "model.text.width=32",
    "model.text.layers=1",
    "data.train_samples=64",
    "data.validation_samples=32",
    "training.batch_size=32",
    "schedule.epochs=1",
    "logging.every_steps=1",
)
_POLL_SECONDS = 1.0


class Row(TypedDict):
    """One figure over the seeds: mean, extremes, standard deviation."""

    name: str
    value: float
    unit: str
    least: float
    most: float
    deviation: float
    seeds: int


@dataclass(frozen=True, slots=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int
    output: Path

    @property
    def name(self) -> str:
        """Such as ``cosmos_0``."""
        return f"{self.method}_{self.seed}"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.output / self.name

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.output / f"{self.name}.txt"

    @property
    def result(self) -> Path:
        """Where its figures go."""
        return self.folder / "comparison.json"

    def epochs(self, wanted: int) -> float:
        """How many of the epochs it has been trained, as far as it has told."""
        if self.result.exists():
            return wanted
        path = self.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return float(rows[-1]["epoch"]) if rows else 0.0


# ---------------------------------------------------------------------------- one run, in its own process


def train_and_evaluate(run: Run, overrides: Sequence[str]) -> None:
    """Train, unless that is done, and write the figures of student and teacher."""
    import cosmos_ssl

    folder = run.folder
    own = [f"output_dir={folder}", f"training.seed={run.seed}"]
    cosmos_ssl.train(f"compare/{run.method}.yaml", [*own, *overrides])
    figures = {f"{role}/{name}": value for role in ROLES for name, value in evaluate(folder, role).items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures["samples_per_second"] = statistics.median(row["samples_per_second"] for row in rows if "samples_per_second" in row)
    part = run.result.with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1) + "\n")
    part.replace(run.result)


def evaluate(folder: Path, role: str) -> dict[str, float]:
    """The figures of one role, as shares."""
    import cosmos_ssl
    from cosmos_ssl.evaluation.features import Job
    from cosmos_ssl.evaluation.tasks import TASKS, Options

    encoder = cosmos_ssl.load(folder, which=role)
    data = encoder.spec.validation_data
    assert data is not None
    templates = {"retrieval": None, "classification": ["a large {}"], "segmentation": ["a {}"]}
    found: dict[str, float] = {}
    for task, used in templates.items():
        found |= TASKS[task](Options(data=data, templates=used), Job()).run(encoder, Job())
    found |= peaks(encoder, data)
    return {name: value for name, value in found.items() if name in (*FIGURES, "chance")}


def peaks(encoder: Any, data: str) -> dict[str, float]:
    """How often the peaks of both maps lie on the named object, over all objects of all scenes; and how often any patch does."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.nn import functional as F

    from cosmos_ssl.data import open_shards
    from cosmos_ssl.data.scenes import CLASS_NAMES
    from cosmos_ssl.evaluation.attention_maps import patch_scores
    from cosmos_ssl.evaluation.classification import class_vectors

    shards, patch = open_shards(data), encoder.spec.image.patch_size
    vectors = class_vectors(encoder, CLASS_NAMES, ["a {}"])
    hits: dict[str, list[bool]] = defaultdict(list)
    shares = []
    for start in range(0, len(shards), 128):
        samples = [shards.read(index) for index in range(start, min(start + 128, len(shards)))]
        pixels = torch.stack([encoder.preprocess(sample.decode()) for sample in samples])
        masks = [np.array(Image.open(io.BytesIO(sample.extras["mask.png"]))) for sample in samples]
        pairs = [(picture, int(value) - 1) for picture, mask in enumerate(masks) for value in np.unique(mask) if value]
        pictures, classes = (torch.tensor(column) for column in zip(*pairs, strict=True))
        named = torch.from_numpy(np.stack(masks))[pictures] == classes[:, None, None] + 1
        on = F.max_pool2d(named[:, None].float(), patch).flatten(1).bool()  # [pairs, patches]
        shares.append(on.float().mean(1))
        maps = {"similarity_peak": patch_scores(encoder, pixels, vectors)[pictures, classes].flatten(1)}
        texts = encoder.tokenize([f"a {CLASS_NAMES[number]}" for number in classes.tolist()])
        if (attention := encoder.cross_attention(pixels[pictures], texts)) is not None:
            maps["attention_peak"] = attention["text"]
        for name, values in maps.items():
            hits[name] += on.gather(1, values.argmax(1, keepdim=True)).flatten().tolist()
    return {name: statistics.fmean(each) for name, each in hits.items()} | {"chance": torch.cat(shares).mean().item()}


# ---------------------------------------------------------------------------- all runs


def costs(overrides: Sequence[str]) -> dict[str, float]:
    """FLOPs of a training step of each method, per sample."""
    from cosmos_ssl.build import Builder
    from cosmos_ssl.config import load_config
    from cosmos_ssl.engine.step_cost import measure_step

    found = {}
    for method in METHODS:
        loaded = load_config(f"compare/{method}.yaml", overrides)
        assembly = Builder(loaded).assemble(prepare=False)
        found[method] = measure_step(assembly, loaded.config, caption_tokens=CAPTION_TOKENS).flops["total"]
    return found


def train_all(runs: Sequence[Run], jobs: int, epochs: int, flops: Mapping[str, float], arguments: Sequence[str]) -> None:
    """Run what has no result yet, ``jobs`` at a time, the longest first. Raises SystemExit where one fails."""
    from cosmos_ssl.cli.progress import stages

    waiting = sorted((run for run in runs if not run.result.exists()), key=lambda run: -flops[run.method])
    live: dict[Run, subprocess.Popen[bytes]] = {}
    try:
        with stages() as told:
            while waiting or live:
                while waiting and len(live) < jobs:
                    run = waiting.pop(0)
                    live[run] = start(run, arguments)
                time.sleep(_POLL_SECONDS)
                for run in [run for run, process in live.items() if process.poll() is not None]:
                    if live.pop(run).returncode:
                        raise SystemExit(f"{run.name} failed; {run.log} ends with:\n{run.log.read_text()[-1000:]}")
                    print(f"{run.name}: done, {sum(run.result.exists() for run in runs)} of {len(runs)}", file=sys.stderr)
                share = sum(flops[run.method] * run.epochs(epochs) for run in runs) / sum(flops[run.method] * epochs for run in runs)
                told("thousandths of all training", int(1000 * share), 1000)
    finally:
        for process in live.values():
            process.terminate()  # saves, and goes on from there next time
        for process in live.values():
            process.wait()


def start(run: Run, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """The process of a run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--run", run.method, str(run.seed), *arguments]
    with run.log.open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------------------- report


def gathered(runs: Sequence[Run], flops: Mapping[str, float], samples: int) -> list[Row]:
    """Every figure of every method and role over the seeds, in per cent, and what each method costs."""
    rows = []
    for method in METHODS:
        own = [json.loads(run.result.read_text()) for run in runs if run.method == method]
        for name in own[0]:
            if name != "samples_per_second":
                rows.append(row(f"{method}/{name}", [100 * figures[name] for figures in own], "%"))
        rows.append(row(f"{method}/flops", [flops[method] / 1e9], "GFLOP a sample"))
        rates = [figures["samples_per_second"] for figures in own]
        rows.append(row(f"{method}/speed", rates, "samples/s"))
        rows.append(row(f"{method}/time", [samples / rate / 60 for rate in rates], "min"))
    return rows


def row(name: str, values: Sequence[float], unit: str) -> Row:
    """Mean, extremes and standard deviation (of a sample) of one figure."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Row(
        name=name, value=statistics.fmean(values), unit=unit, least=min(values), most=max(values), deviation=spread, seeds=len(values)
    )


def markdown(rows: Sequence[Row], role: str) -> str:
    """A table of one role: a line a figure, a column a method, cells ``mean (least to most)``."""
    found = {each["name"]: each for each in rows}

    def cells(name: str, digits: int = 1) -> list[str]:
        told = [found.get(f"{method}/{name}") for method in METHODS]
        return ["-" if each is None else f"{each['value']:.{digits}f}" + spread(each, digits) for each in told]

    def spread(each: Row, digits: int) -> str:
        return f" ({each['least']:.{digits}f} to {each['most']:.{digits}f})" if each["least"] != each["most"] else ""

    lines = [[f"{role}, %", *METHODS.values()], ["---"] * (1 + len(METHODS))]
    lines += [[text, *cells(f"{role}/{name}")] for name, text in FIGURES.items()]
    lines += [["any patch on a named object", *cells(f"{role}/chance")]]
    if role == "student":
        lines += [["GFLOP a sample", *cells("flops", 2)], ["minutes of training, one core", *cells("time")]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Train, evaluate, print the tables."""
    parser = argparse.ArgumentParser(description="CLIP, CLIP with multi-crop and COSMOS on procedural scenes, with equal samples.")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), metavar="DIR", help="the runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each method (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: those of the configs")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side, on a core each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny runs that show that all works, and nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    overrides = [*(QUICK if arguments.quick else ()), *([f"schedule.epochs={arguments.epochs}"] if arguments.epochs else [])]
    if arguments.run:
        method, seed = arguments.run
        train_and_evaluate(Run(method, int(seed), arguments.output), overrides)
        return 0
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    runs = [Run(method, seed, arguments.output) for method in METHODS for seed in seeds]
    from cosmos_ssl.config import load_config

    config = load_config("compare/cosmos.yaml", overrides).config
    assert config.data is not None
    epochs = config.schedule.epochs
    samples = epochs * config.data.options["train_samples"]
    flops = costs(overrides)
    passed = ["--output", str(arguments.output), *(["--quick"] if arguments.quick else [])]
    passed += ["--epochs", str(arguments.epochs)] if arguments.epochs else []
    train_all(runs, arguments.jobs, epochs, flops, passed)
    rows = gathered(runs, flops, samples)
    print(f"{samples:,} samples a run, {arguments.seeds} seeds: mean (least to most)\n")
    print("\n\n".join(markdown(rows, role) for role in ROLES))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
