#!/usr/bin/env python3
"""Compare whole runs with the time of a plain implementation: python tools/bench_run.py KEY=VALUE ...

Each of ``--configs`` is trained from start to last evaluation by its own command. It uses all cores, which ``--nproc``
ranks share. The configs run once in the given order, then once in reverse with the next seed. Before the first and
after the last, the plain implementation of ``baseline.py`` runs some steps of the recipe ``--plain`` in one process.
The plain time is that for all samples of this recipe. It includes neither loading nor evaluation, which the time of a
run does.

``KEY=VALUE`` applies to all runs, for example to select the data. Results are the means of both runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import Row, make_duration_row, make_ratio_row, make_row, report
from bench_step import StepProcess

from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.engine.assembly import make_order, total_steps
from cosmos_ssl.errors import CosmosError

PLAIN = "compare/pictures.yaml"
CONFIGS = (PLAIN, "compare/pictures_fast.yaml")
METRICS = {
    "student mean rank": "retrieval/student/image_to_text_mean_rank",
    "student R@1": "retrieval/student/image_to_text_R@1",
    "teacher mean rank": "retrieval/teacher/image_to_text_mean_rank",
}
"""Metrics of the last evaluation, and their keys in ``metrics.jsonl``."""
MIN_RUN_SECONDS = 1.0
"""A run imports PyTorch, trains and evaluates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The duration of a run, its steps and its last metrics."""

    seconds: float
    steps: int
    metrics: dict[str, float]


def train(config: str, folder: Path, overrides: Sequence[str]) -> Outcome:
    """Train once, from the start of the command to its end. Raises SystemExit if it fails."""
    program = Path(sys.executable).with_name("cosmos-launch")
    command = [str(program), "--config", config, f"output_dir={folder}", *overrides]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in rows for key, value in line.items()}
    return Outcome(seconds=seconds, steps=last["step"], metrics={name: last[key] for name, key in METRICS.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """The plain implementation of a recipe."""

    config: str
    batch: int
    samples: int
    """Samples of the whole run."""

    @classmethod
    def of(cls, config: str, overrides: Sequence[str]) -> Plain:
        """Read the recipe and index its data."""
        loaded = load_config(config, overrides)
        dataset = Builder(loaded).assemble("train").dataset
        assert dataset is not None
        batch = loaded.config.training.batch_size
        steps = total_steps(loaded.config, make_order(loaded.config, dataset.shard_sizes))
        return cls(config=config, batch=batch, samples=steps * batch)

    def measure_seconds(self, steps: int, overrides: Sequence[str]) -> float:
        """Return the median time of some steps."""
        process = StepProcess("plain", ["--variants", self.config, "--samples", str(self.batch), *overrides])
        process.request("step")  # the first one allocates what the others use again
        seconds: float = statistics.median(process.request("step")[0] for _ in range(steps))
        process.close()
        return seconds


def measure(
    plain: Plain,
    configs: Sequence[str],
    output: Path,
    *,
    steps: int,
    nproc: int,
    overrides: Sequence[str],
    train: Callable[[str, Path, Sequence[str]], Outcome] = train,
) -> list[Row]:
    """Return the rows of all runs."""
    step_seconds = [plain.measure_seconds(steps, overrides)]
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for seed, order in enumerate((configs, configs[::-1])):
        for config in order:
            name = Path(config).stem
            own = [*overrides, f"training.seed={seed}", f"profile.nproc={nproc}"]
            outcome = train(config, output / f"{name}_{seed}", own)
            print(f"{name}, seed {seed}: {outcome}", file=sys.stderr)
            outcomes[name].append(outcome)
    step_seconds.append(plain.measure_seconds(steps, overrides))
    speed = statistics.fmean(plain.batch / seconds for seconds in step_seconds)
    whole = plain.samples / speed
    rows = [make_row("plain: samples a second", speed, "1/s"), make_duration_row("plain: time of its steps", whole)]
    for name, results in outcomes.items():
        seconds = statistics.fmean(outcome.seconds for outcome in results)
        rows.append(make_duration_row(f"{name}: time", seconds, more_than=MIN_RUN_SECONDS))
        rows.append(make_ratio_row(f"{name}: time of plain", seconds, whole, "of plain"))
        rows.append(make_row(f"{name}: steps", min(outcome.steps for outcome in results)))
        for metric in METRICS:
            value = statistics.fmean(outcome.metrics[metric] for outcome in results)
            bounds = {"at_least": 1.0} if "rank" in metric else {"more_than": None}  # a recall may be 0
            rows.append(make_row(f"{name}: {metric}", value, **bounds))
    return rows


def main() -> int:
    """Print a table; exit with 1 if a row fails."""
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
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
