"""The worked example of each page of the contract keeps to the contract, and the example data train a model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from types import ModuleType

import pytest

from cosmos_ssl import testing

Example = Callable[[str], ModuleType]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    """The code within the docstring of ``cosmos_ssl.api.PAGE``, as a module that can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(page: str) -> ModuleType:
        lines = (importlib.import_module(f"cosmos_ssl.api.{page}").__doc__ or "").splitlines()
        start = next(i for i, line in enumerate(lines) if line.endswith("full::")) + 1
        stop = next(i for i, line in enumerate(lines) if i > start and line and not line.startswith(" "))
        name = f"example_{page}"
        (tmp_path / f"{name}.py").write_text(cleandoc("\n".join(lines[start:stop])))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_loss(example: Example) -> None:
    testing.check_loss(example("loss").Spread, floor=0.1)


def test_head(example: Example) -> None:
    testing.check_head(example("head").Bottleneck, width=8)


def test_tower(example: Example) -> None:
    testing.check_tower(example("tower").BagOfPatches, width=24, image_size=32, patch_size=8)


def test_teacher(example: Example) -> None:
    testing.check_teacher(example("teacher").Snapshot, every=2)


def test_optimizer_and_schedule(example: Example) -> None:
    testing.check_optimizer(example("optimizer").HeavyBall, momentum=0.5)
    testing.check_schedule(example("schedule").Halving, every=3)


def test_data_and_evaluator(example: Example, tmp_path: Path) -> None:
    data, names = example("data"), example("evaluator").ColourNames
    changes = {
        "data": {"type": data.Colours, "samples": 8},
        "tokenizer": {"type": data.Bytes},
        "evaluators": {"colours": {"type": names}, "retrieval": None, "classification": None},
    }
    rows = testing.small_run(tmp_path, changes, steps=30)
    assert rows[-1]["loss"] < rows[0]["loss"]
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["colours/teacher/top1"] for row in found if "colours/teacher/top1" in row]
    assert [row["colours/student/top1"] for row in found if "colours/student/top1" in row][-1] == 1


def test_writer(example: Example, tmp_path: Path) -> None:
    lowest = example("writer").Lowest
    (folder := tmp_path / "run").mkdir()
    testing.check_writer(lowest, folder=folder)
    assert (folder / "part.txt").read_text().split() == ["1", "0.125"]


def test_callback(example: Example) -> None:
    testing.check_callback(example("callback").WeightNoise, scale=0.1)
