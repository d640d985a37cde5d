#!/usr/bin/env python3
"""Whole runs beside the time that the plain way would take for one: python tools/bench_run.py KEY=VALUE ...

How soon does a recipe reach what another reaches? Each of ``--configs`` is trained from start to last evaluation by a
command of its own, on all cores, which ``--nproc`` ranks share: once in the order given, then once more in reverse with
the next seed. Around them, before the first and after the last, the plain way of ``baseline.py`` makes some steps of
the recipe ``--plain`` in one process; its time for as many samples as that recipe trains on counts neither loading nor
evaluation, which a run's time does.

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

from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.engine.assembly import make_order, total_steps
from cosmos_ssl.errors import CosmosError

PLAIN = "compare/pictures.yaml"
CONFIGS = (PLAIN, "compare/pictures_fast.yaml")
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
    figures: dict[str, float]


def train(config: str, folder: Path, overrides: Sequence[str]) -> Outcome:
    """One run, from the start of its command to its end. Raises SystemExit where it fails."""
    program = Path(sys.executable).with_name("cosmos-launch")
    command = [str(program), "--config", config, f"output_dir={folder}", *overrides]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in rows for key, value in line.items()}
    return Outcome(seconds=seconds, figures={name: last[key] for name, key in FIGURES.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """The plain way of a recipe."""

    config: str
    batch: int
    samples: int
    """Of the whole run."""

    @classmethod
    def of(cls, config: str, overrides: Sequence[str]) -> Plain:
        """Read the recipe and index its data."""
        loaded = load_config(config, overrides)
        dataset = Builder(loaded).assemble("train").dataset
        assert dataset is not None
        batch = loaded.config.training.batch_size
        steps = total_steps(loaded.config, make_order(loaded.config, dataset.shard_sizes))
        return cls(config=config, batch=batch, samples=steps * batch)

    def speed(self, steps: int, overrides: Sequence[str]) -> float:
        """Samples a second, by the median of some steps."""
        side = Side("plain", ["--variants", self.config, "--samples", str(self.batch), *overrides])
        side.ask("step")  # the first one makes what the others use again
        seconds = statistics.median(side.ask("step")[0] for _ in range(steps))
        side.close()
        return self.batch / seconds


def measure(
    plain: Plain, configs: Sequence[str], output: Path, *, steps: int, nproc: int, overrides: Sequence[str]
) -> list[Row]:
    """The rows of all runs."""
    speeds = [plain.speed(steps, overrides)]
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for seed, order in enumerate((configs, configs[::-1])):
        for config in order:
            name = Path(config).stem
            given = [*overrides, f"training.seed={seed}", f"profile.nproc={nproc}"]
            outcome = train(config, output / f"{name}_{seed}", given)
            print(f"{name}, seed {seed}: {outcome}", file=sys.stderr)
            outcomes[name].append(outcome)
    speeds.append(plain.speed(steps, overrides))
    speed = statistics.fmean(speeds)
    whole = plain.samples / speed
    rows = [row("plain: samples a second", speed, "1/s"), row("plain: time of its steps", whole, "s")]
    for name, found in outcomes.items():
        seconds = statistics.fmean(outcome.seconds for outcome in found)
        rows += [row(f"{name}: time", seconds, "s"), row(f"{name}: time of plain", seconds / whole, "of plain")]
        rows += [
            row(f"{name}: {figure}", statistics.fmean(outcome.figures[figure] for outcome in found))
            for figure in FIGURES
        ]
    return rows


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Benchmark of whole runs.")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="FILE", help=f"default: {' '.join(CONFIGS)}")
    parser.add_argument("--plain", default=PLAIN, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_run"), metavar="DIR", help="of the runs, new")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks of a run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="of the plain way, before and after (default: 6)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all runs")
    arguments = parser.parse_intermixed_args()
    if arguments.nproc < 1:
        parser.error("--nproc: give at least 1")
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists: a run that goes on is no measurement")
    if len({Path(config).stem for config in arguments.configs}) < len(arguments.configs):
        parser.error("--configs: give files of different names, by which runs are called")
    try:
        plain = Plain.of(arguments.plain, arguments.overrides)
    except CosmosError as error:
        raise SystemExit(str(error)) from error
    rows = measure(
        plain,
        arguments.configs,
        arguments.output,
        steps=arguments.steps,
        nproc=arguments.nproc,
        overrides=arguments.overrides,
    )
    report(rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
