#!/usr/bin/env python3
"""Whole runs, and the time that the plain way would take for the first of them: python tools/bench_run.py KEY=VALUE ...

How soon does a recipe reach what another reaches? Each of ``--configs`` is trained by a process of its own, from start
to last evaluation, on all cores: once in the order given, then once more in reverse with the next seed. Around them,
before the first and after the last, the plain way of ``baseline.py`` makes some steps of the first recipe; its time for
as many samples as that recipe trains on counts neither loading nor evaluation, which a run's time does.

``KEY=VALUE`` is given to all runs: which data, mostly. Figures are the means of both runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import Row, report, row
from bench_step import Side

from cosmos_ssl.config import load_config

CONFIGS = ("compare/pictures.yaml", "compare/pictures_fast.yaml")
FIGURES = {
    "student mean rank": "retrieval/student/image_to_text_mean_rank",
    "student R@1": "retrieval/student/image_to_text_R@1",
    "teacher mean rank": "retrieval/teacher/image_to_text_mean_rank",
}
"""Of the last evaluation, and their keys in ``metrics.jsonl``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run has reached, and when."""

    seconds: float
    samples: int
    figures: dict[str, float]


def train(config: str, folder: Path, overrides: Sequence[str]) -> Outcome:
    """One run, from the start of its process to its end. Raises SystemExit where it fails."""
    command = ["cosmos-launch", "--config", config, f"output_dir={folder}", *overrides]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in rows for key, value in line.items()}
    batch = load_config(folder / "config.yaml").config.training.batch_size
    return Outcome(
        seconds=seconds,
        samples=int(last["step"]) * batch,
        figures={name: last[key] for name, key in FIGURES.items()},
    )


def plain_speed(config: str, steps: int, overrides: Sequence[str]) -> float:
    """Samples a second of the plain way, on batches of the recipe's size."""
    batch = load_config(config, overrides).config.training.batch_size
    side = Side("plain", ["--variants", config, "--samples", str(batch), *overrides])
    side.ask("step")  # the first one makes what the others use again
    seconds = statistics.median(side.ask("step")[0] for _ in range(steps))
    side.close()
    return batch / seconds


def measure(configs: Sequence[str], output: Path, steps: int, overrides: Sequence[str]) -> list[Row]:
    """The rows of all runs."""
    speeds = [plain_speed(configs[0], steps, overrides)]
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for seed, order in enumerate((configs, configs[::-1])):
        for config in order:
            name = Path(config).stem
            outcome = train(config, output / f"{name}_{seed}", [*overrides, f"training.seed={seed}"])
            print(f"{name}, seed {seed}: {outcome}", file=sys.stderr)
            outcomes[name].append(outcome)
    speeds.append(plain_speed(configs[0], steps, overrides))
    speed = statistics.fmean(speeds)
    plain = outcomes[Path(configs[0]).stem][0].samples / speed
    rows = [row("plain: samples a second", speed, "1/s"), row("plain: time of its steps", plain, "s")]
    for name, found in outcomes.items():
        seconds = statistics.fmean(outcome.seconds for outcome in found)
        rows += [row(f"{name}: time", seconds, "s"), row(f"{name}: time of plain", seconds / plain, "of plain")]
        rows += [
            row(f"{name}: {figure}", statistics.fmean(outcome.figures[figure] for outcome in found))
            for figure in FIGURES
        ]
    return rows


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Benchmark of whole runs.")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_run"), metavar="DIR", help="of the runs, new")
    parser.add_argument("--steps", type=int, default=6, help="of the plain way, before and after (default: 6)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all runs")
    arguments = parser.parse_intermixed_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists: a run that goes on is no measurement")
    report(measure(arguments.configs, arguments.output, arguments.steps, arguments.overrides), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
