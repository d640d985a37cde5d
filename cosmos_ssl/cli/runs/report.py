"""Runs as JSON and CSV, their order, the metrics that are meant, and the keys in which their configs differ."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from cosmos_ssl.cli.runs.reading import Run
from cosmos_ssl.cli.runs.series import lower_is_better, summary
from cosmos_ssl.errors import UserError, listed, printable

FACTS = ("name", "state", "step", "samples", "hours", "samples_per_second", "mfu")
"""What every run can be sorted by, beside its metrics."""

NOT_GIVEN = "not given"
_SHOWN = ("loss", "*R@1", "*/top1", "*/mean_iou")
_HIDDEN = ("output_dir",)  # of every run another


def metric_names(runs: Sequence[Run]) -> list[str]:
    """The names of all numbers, as they first come."""
    return [name for name in dict.fromkeys(name for run in runs for name in run.series) if name != "epoch"]


def chosen_metrics(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    """The metrics that match one of some shell patterns. Raises UserError for a pattern that none matches."""
    names = metric_names(runs)
    found = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, matches in found.items():
        if not matches:
            raise UserError(f"--metrics {pattern}: no run has such a metric.{_nearest(pattern.strip('*'), names)}")
    return list(dict.fromkeys(name for matches in found.values() for name in matches))


def shown_metrics(runs: Sequence[Run], sort: str | None) -> list[str]:
    """The metrics of a table where none are asked for: what is sorted by, the loss, and the first of evaluations, of
    the teacher where there is one.
    """
    names = metric_names(runs)
    found = [sort] if sort in names and sort is not None else []
    first = [name for pattern in _SHOWN for name in names if fnmatchcase(name, pattern)]
    teachers = {name for name in first if "/teacher/" in name}
    found += [name for name in first if name.replace("/student/", "/teacher/") not in teachers - {name}]
    return list(dict.fromkeys(found))


def sorted_runs(runs: Sequence[Run], key: str | None, *, worst_first: bool = False) -> list[Run]:
    """Runs by a metric's best value, or by a fact; the best first, those without it at the end.

    Raises UserError for what no run has.
    """
    if key is None:
        return list(runs)
    names = metric_names(runs)
    if key not in names and key not in FACTS:
        raise UserError(f"--sort {key}: no run has such a metric.{_nearest(key, [*names, *FACTS])}")
    values = [(run, _value(run, key)) for run in runs]
    lower = key in ("name", "state") or (key in names and lower_is_better(key))
    there = sorted((pair for pair in values if pair[1] is not None), key=lambda pair: pair[1], reverse=not lower)
    there = there[::-1] if worst_first else there
    return [run for run, _ in there] + [run for run, value in values if value is None]


def _value(run: Run, key: str) -> Any:
    if key in run.series:
        return summary(run.series[key], key)["best"]
    return facts(run).get(key)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=3, cutoff=0.5) or [each for each in names if name and name in each]
    if not names:
        return " There are no rows of metrics yet"
    return f" Near: {listed(near, limit=3)}" if near else f" There are: {listed(names, limit=8)}"


def facts(run: Run) -> dict[str, Any]:
    """The numbers of a run that are not metrics."""
    return {
        "name": run.name,
        "state": run.state,
        "step": run.step,
        "samples": run.samples,
        "hours": run.hours,
        "samples_per_second": run.rate,
        "mfu": run.mfu,
    }


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Key path -> value in each run, for the keys in which the runs differ; ``NOT_GIVEN`` where one lacks it."""
    keys = dict.fromkeys(key for run in runs if run.config for key in run.config)
    found = {key: [run.config.get(key, NOT_GIVEN) for run in runs] for key in keys if key not in _HIDDEN}
    return {key: values for key, values in found.items() if len({json.dumps(value) for value in values}) > 1}


def as_json(runs: Sequence[Run], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One object a run; what is not known is null."""
    differences = config_differences(runs)
    return [
        {
            "run": str(run.folder),
            **facts(run),
            "why": run.why,
            "total_steps": run.total,
            "flops_per_sample": run.flops,
            "metrics": {name: summary(run.series[name], name) for name in metrics if name in run.series},
            "config": {key: values[number] for key, values in differences.items()},
            "warnings": sum(each.count for each in run.warnings),
            "notes": list(run.notes),
        }
        for number, run in enumerate(runs)
    ]


def as_csv(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """A line a run: facts, ``METRIC last``, ``METRIC best``, ``METRIC best step`` and ``config KEY``."""
    rows: list[dict[str, Any]] = []
    for one in as_json(runs, metrics):
        flat = {key: one[key] for key in ("run", *FACTS, "why", "total_steps", "flops_per_sample", "warnings")}
        for name in metrics:
            told = one["metrics"].get(name, {})
            flat |= {f"{name} {key.replace('_', ' ')}": told.get(key) for key in ("last", "best", "best_step")}
        rows.append(flat | {f"config {key}": shown(value) for key, value in one["config"].items()})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def remarks(runs: Sequence[Run], *, warnings: bool = True) -> list[tuple[str, str]]:
    """What is to be said beside the numbers: names of runs, and what is so of these.

    Why they stand where they do, what of them could not be read, and how many ``warnings`` their logs hold.
    """
    found: dict[str, list[str]] = {}
    for run in runs:
        count = sum(each.count for each in run.warnings)
        told = [f"{run.state}: {run.why}"] if run.why else []
        told += [f"{count:,} {'warning' if count == 1 else 'warnings'} in log.txt"] if count and warnings else []
        for text in [*told, *run.notes]:
            found.setdefault(" ".join(text.split()), []).append(run.name)
    return [(listed(names, limit=8), text) for text, names in found.items()]


def shown(value: Any) -> str:
    """A value of a config on one line."""
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
