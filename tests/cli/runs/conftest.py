"""Run folders as the trainer writes them, without a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

WriteRun = Callable[..., Path]
LOG = "2026-01-02 03:04:05,678 {} {}\n"
CONFIG = {"name": "a", "output_dir": "x", "optimizer": {"lr": 0.1}, "schedule": {"epochs": 4, "max_steps": None}}
CONFIG |= {"training": {"batch_size": 8, "seed": 0}}


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]] = (),
    *,
    config: Mapping[str, Any] | None = None,
    log: Sequence[tuple[str, str]] = (("INFO", "training a"),),
    result: Mapping[str, Any] | None = None,
    pictures: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """A run folder; ``pictures``: steps by kind."""
    folder.mkdir(parents=True)
    tree = {**CONFIG, "output_dir": str(folder), **(config or {})}
    (folder / "config.yaml").write_text("name: a\n")
    (folder / "identity.json").write_text(json.dumps({"config": tree, "data": {}}))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "log.txt").write_text("".join(LOG.format(*line) for line in log))
    if result is not None:
        (folder / "result.json").write_text(json.dumps({"metrics": {}, **result}))
    for kind, steps in (pictures or {}).items():
        for step in steps:
            place = folder / "pictures" / f"step_{step:08d}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (900, 600), (step % 256, 90, 200)).save(place / f"{kind}.png")
    return folder


def rows_of(number: int, count: int, names: int = 2) -> list[dict[str, Any]]:
    """Rows of a run: a loss that falls, and what else a run reports; 16 steps an epoch."""
    return [
        {
            "step": step,
            "epoch": step / 16,
            "loss": 6 / math.sqrt(step) + 0.1 * number + 0.2 * math.sin(step * (number + 1)),
            "samples_per_second": 100.0 + number,
            **{f"extra/n{k}": math.cos(step / 50 + k) for k in range(names - 2)},
            **({"retrieval/teacher/text_to_image_R@1": (step % 97) / 100} if step % 16 == 0 else {}),
        }
        for step in range(1, count + 1)
    ]


@pytest.fixture(scope="session")
def written() -> WriteRun:
    """``write_run``."""
    return write_run


@pytest.fixture(scope="session")
def made_rows() -> Callable[..., list[dict[str, Any]]]:
    """``rows_of``."""
    return rows_of
