"""Models side by side: every metric with its 95 % interval, and the difference from the first model's with its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cosmos_ssl.evaluation.bootstrap import interval, resampled
from cosmos_ssl.evaluation.report import shown
from cosmos_ssl.evaluation.suite import Item
from cosmos_ssl.evaluation.tasks import Found


class Row(NamedTuple):
    """One metric of one model. Intervals are (low, high); ``difference`` is None for the first model."""

    task: str
    set: str
    metric: str
    model: str
    value: float
    interval: tuple[float, float]
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    paired: bool = False
    """The same samples were drawn for both models, since both saw the same."""


def comparison(models: Mapping[str, Mapping[Item, Found]]) -> list[Row]:
    """A row for each metric that can be drawn again, of each model; the first that has an item is what others are
    compared with.
    """
    rows: list[Row] = []
    for item in dict.fromkeys(item for found in models.values() for item in found):
        first: tuple[Found, Mapping[str, Tensor]] | None = None
        for number, (model, found) in enumerate(models.items()):
            if item not in found:
                continue
            own = found[item]
            paired = first is not None and list(own.keys) == list(first[0].keys)
            drawn = resampled(own.outcomes, len(own.keys), seed=0 if first is None or paired else number)
            for metric, values in drawn.items():
                row = Row(item.task, item.set_name or "", metric, model, own.metrics[metric], interval(values))
                if first is not None and metric in first[1]:
                    row = row._replace(
                        difference=own.metrics[metric] - first[0].metrics[metric],
                        difference_interval=interval(values - first[1][metric]),
                        paired=paired,
                    )
                rows.append(row)
            first = first or (own, drawn)
    return rows


def comparison_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of a table: a metric and a model a line; shares in percent."""

    def span(metric: str, ends: Sequence[float] | None) -> str:
        return "" if ends is None else f"{shown(metric, ends[0])} to {shown(metric, ends[1])}"

    lines: list[tuple[str, ...]] = [("TASK", "SET", "METRIC", "MODEL", "VALUE", "95 %", "FROM FIRST", "95 %", "PAIRED")]
    for row in rows:
        metric, difference = str(row["metric"]), row["difference"]
        lines.append(
            (
                *(str(row[key]) for key in ("task", "set", "metric", "model")),
                shown(metric, row["value"]),
                span(metric, row["interval"]),
                "" if difference is None else f"{'+' if difference > 0 else ''}{shown(metric, difference)}",
                span(metric, row["difference_interval"]),
                "" if difference is None else "yes" if row["paired"] else "no",
            )
        )
    return lines
