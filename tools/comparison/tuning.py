"""Settings of each method, chosen by trials that cost every method the same, on other seeds and other data.

First the learning rate (half, all and twice the recipe's), then a fourth beyond the best one where that is the least or
the most, else between it and the second best. At the best of the first three, other crops, and where the method learns
from a teacher its momentum; else further crops. A trial is judged by the student's R@5, the mean of both ways. The best
value of each is taken. Trials are short, and short runs suit high rates and low momenta: no lower momentum is tried.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparison.plan import Method, Run, Setting, run_all

SEED = 100
"""Of trials; runs that are reported count from 0."""
TRIALS = 6
"""Of each method."""
CROPS = ((0.9, 1.0), (0.6, 1.0), (0.4, 1.0))
MOMENTA = (0.97, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A method with the settings that suit it, and all trials: settings and score."""

    method: Method
    trials: dict[str, float]
    flops: float
    """Of all its trials."""


def tune(
    compared: Sequence[Method], setting: Setting, share: float, output: Path, jobs: int, program: str
) -> list[Tuned]:
    """Choose the settings of every method by ``TRIALS`` trials, each of which costs ``share`` of the dearest method's
    training.
    """
    each = share * max(method.total for method in compared)
    short = [method.for_flops(each) for method in compared]
    scores: list[dict[tuple[str, ...], float]] = [{} for _ in compared]
    flops = [0.0] * len(compared)

    def attempt(asked: Sequence[Sequence[tuple[str, ...]]]) -> None:
        """Make the trials that are asked of each method."""
        runs: dict[tuple[int, tuple[str, ...]], Run] = {}
        for place, (method, options) in enumerate(zip(short, asked, strict=True)):
            for changed in options:
                own = replace(method, overrides=(*method.overrides, *setting.trial, *changed))
                name = "_".join((method.key, *(re.sub(r"^[\w.]*\.|[^\w.]+", " ", text) for text in changed)))
                folder = output / "trials" / "_".join(name.split())
                runs[place, changed] = Run(method=own, seed=SEED, folder=folder)
        run_all(list(runs.values()), jobs, program)
        for (place, changed), run in runs.items():
            scores[place][changed] = score(run.figures)
            flops[place] += run.method.total

    axes = [Axes.of(method) for method in compared]
    attempt([own.first() for own in axes])
    attempt([own.second(found) for own, found in zip(axes, scores, strict=True)])
    tuned = []
    for method, own, found, spent in zip(compared, axes, scores, flops, strict=True):
        chosen = replace(method, overrides=(*method.overrides, *own.together(found)))
        tuned.append(Tuned(method=chosen, trials={", ".join(key): value for key, value in found.items()}, flops=spent))
    return tuned


def score(figures: dict[str, float]) -> float:
    """What a trial is judged by."""
    return statistics.fmean(figures[f"student/{way}_R@5"] for way in ("image_to_text", "text_to_image"))


def best(found: dict[tuple[str, ...], float]) -> tuple[str, ...]:
    """The settings with the highest score."""
    return max(found, key=lambda key: found[key])


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """What can be set of a method: key and values, the recipe's first."""

    rate: float
    others: dict[str, list[Any]]

    @classmethod
    def of(cls, method: Method) -> Axes:
        """Read the recipe."""
        from cosmos_ssl.config import load_config

        config = load_config(f"compare/{method.recipe}.yaml", method.overrides).config
        image = config.augmenters.image.options
        key = "global_crops_scale" if "global_crops_scale" in image else "scale"
        crops = tuple(image.get(key, CROPS[0]))
        others: dict[str, list[Any]] = {f"augmenters.image.{key}": _led_by(crops, CROPS)}
        if set(config.losses) - {"clip", "siglip"}:  # something learns from the teacher
            others = {key: own[:2] for key, own in others.items()}
            others["teacher.momentum_teacher"] = _led_by(config.teacher.options["momentum_teacher"], MOMENTA)[:2]
        return cls(rate=config.optimizer.lr, others=others)

    def rates(self, *times: float) -> list[tuple[str, ...]]:
        """Learning rates as overrides."""
        return [(f"optimizer.lr={self.rate * by:.3g}",) for by in times]

    def first(self) -> list[tuple[str, ...]]:
        """The trials that come first."""
        return self.rates(0.5, 1, 2)

    def second(self, found: dict[tuple[str, ...], float]) -> list[tuple[str, ...]]:
        """Those that follow: the fourth learning rate, and at the best of the first ones other values of the rest."""
        low, middle, high = (found[key] for key in self.first())
        if middle >= max(low, high):
            further = self.rates(0.7 if low > high else 1.4)
        else:
            further = self.rates(0.25 if low > high else 4)
        rate = best(found)
        return further + [(*rate, _override(key, value)) for key, values in self.others.items() for value in values[1:]]

    def together(self, found: dict[tuple[str, ...], float]) -> list[str]:
        """The best value of each: of what was tried at the best of the first learning rates, and that rate."""
        rate = best({key: value for key, value in found.items() if len(key) == 1})
        base = best({key: found[key] for key in self.first()})
        chosen = list(rate)
        for key in self.others:
            tried = {own: value for own, value in found.items() if len(own) == 2 and own[1].startswith(f"{key}=")}
            if (winner := best(tried)) and found[winner] > found[base]:
                chosen.append(winner[1])
        return chosen


def _led_by(own: Any, values: Sequence[Any]) -> list[Any]:
    return [own, *(value for value in values if value != own)]


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"
