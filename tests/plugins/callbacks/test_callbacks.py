"""Built-in callbacks: by the contract, by their formulas, and over kill and resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import cosmos_ssl
from cosmos_ssl.api import Callback, CallbackContext, Curve, Progress, Spec
from cosmos_ssl.engine.checkpoint import find_fault
from cosmos_ssl.errors import ConfigError, UserError
from cosmos_ssl.testing import check_callback, example_spec, small_run
from cosmos_ssl_plugins.callbacks.schedule_value import ScheduleValue
from cosmos_ssl_plugins.callbacks.watching import EarlyStopping
from cosmos_ssl_plugins.callbacks.weight_average import WeightAverage
from cosmos_ssl_plugins.callbacks.wise_ft import WiseFT
from cosmos_ssl_plugins.schedules.ways import Linear


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("best_checkpoint", {"metric": "loss", "mode": "min"}),
        ("early_stopping", {"metric": "eval/student/top1", "mode": "max", "patience": 1}),
        ("schedule_value", {"match": "heads.cross.*", "value": {"type": "cosine", "start": 0.0, "end": 1.0}}),
        ("unfreeze", {"match": "image.*", "step": 3}),
        ("weight_average", {"decay": 0.5}),
        ("weight_average", {"decay": None, "begin": 1, "every_steps": 2}),
        ("wise_ft", {"alpha": 0.25, "evaluate": True}),
    ],
)
def test_contract(name: str, options: dict[str, Any]) -> None:
    check_callback(name, **options)


def context(model: torch.nn.Module, step: int) -> CallbackContext:
    progress = Progress(step=step, total_steps=10)
    return CallbackContext(model=model, teacher=None, progress=progress, writers=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("decay", "expected"), [(None, (3 + 5 + 7) / 3), (0.5, ((3 + 5) / 2 + 7) / 2)])
def test_the_average_is_its_formula(decay: float | None, expected: float) -> None:
    model, average = torch.nn.Linear(1, 1), WeightAverage(example_spec(), decay=decay, begin=2, every_steps=2)
    for step in range(8):  # counted are the weights after 4, 6 and 8 steps
        torch.nn.init.constant_(model.weight, float(step))
        average.after_step(context(model, step))
    assert average.average["weight"].item() == pytest.approx(expected)


def test_the_mix_is_its_formula() -> None:
    """Also where a run goes on. Of an adapter's two factors the second is mixed, which makes their product the mix."""
    model = torch.nn.ModuleDict({"map": torch.nn.Linear(1, 1), "lora_A": torch.nn.Linear(1, 1)})
    part, later = (WiseFT(example_spec(), alpha=0.25, evaluate=True) for _ in range(2))
    for value in (2.0, 6.0):
        for module in model.values():
            torch.nn.init.constant_(module.weight, value)
        part.start(context(model, 0))
    later.load_state_dict(part.state_dict())
    later.start(context(model, 5))
    for found in (part.evaluated(), later.evaluated()):
        assert (found["map.weight"], found["lora_A.weight"]) == (0.75 * 2 + 0.25 * 6, 6) and len(found) == 4


def test_better_is_by_more_than_min_delta() -> None:
    part = EarlyStopping(example_spec(), metric="loss", mode="min", min_delta=0.1)
    values = (1.0, 0.95, 0.89, math.nan, 0.5)
    contexts = [replace(context(torch.nn.Linear(1, 1), 0), metrics={"loss": value}) for value in values]
    assert [part.better(each) for each in contexts] == [True, False, True, False, True] and part.best == 0.5


def test_a_value_goes_its_way() -> None:
    """By its curve; where a run goes on, an evaluation before the first step sees the value of the step before."""
    way = Curve[float](type="linear", start=1.0, end=0.0).follow(Linear(example_spec(), over_steps=4))
    part, model = ScheduleValue(example_spec(), match="*.p", value=way), torch.nn.Sequential(torch.nn.Dropout(0.5))
    found = []
    for step in range(6):
        part.before_step(context(model, step))
        found.append(model[0].p)
    part.start(context(model, 3))
    assert [*found, model[0].p] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0, 0.5])


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ({"type": "unfreeze", "match": "image.nothing", "epoch": 1}, "match: 'image.nothing' matches no parameter"),
        ({"type": "unfreeze", "match": "*"}, "give either epoch or step"),
        (
            {"type": "schedule_value", "match": "losses.clip.x", "value": {"type": "linear", "start": 0.0, "end": 1.0}},
            "is no float of a part. There are",
        ),
    ],
)
def test_what_is_not_there_is_refused_in_the_check(callback: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.partition(": ")[2] or message):
        small_run(tmp_path, {"callbacks": {"x": callback}})
    assert not (tmp_path / "run").exists()


class Recorder(Callback):
    """Notes two weights after each step."""

    watches = True
    seen: ClassVar[list[dict[str, torch.Tensor]]] = []

    def __init__(self, spec: Spec) -> None:
        self.seen.clear()

    def after_step(self, ctx: CallbackContext) -> None:
        names = ("image", "text")
        self.seen.append({name: next(ctx.model.get_submodule(name).parameters()).detach().clone() for name in names})


def test_frozen_until_then(tmp_path: Path) -> None:
    later = {"type": "unfreeze", "match": "image.*", "step": 2}
    small_run(tmp_path, {"callbacks": {"later": later, "recorder": {"type": Recorder}}}, steps=4)
    moved = [{name: not torch.equal(a[name], b[name]) for name in a} for a, b in pairwise(Recorder.seen)]
    assert moved == [{"image": False, "text": True}, *2 * [{"image": True, "text": True}]]


def test_a_run_ends_early_keeps_its_best_and_averages(tmp_path: Path) -> None:
    callbacks = {
        "stop": {"type": "early_stopping", "metric": "loss", "mode": "max", "patience": 2},
        "best": {"type": "best_checkpoint", "metric": "loss", "mode": "min"},
        "average": {"type": "weight_average", "decay": 0.5, "evaluate": True},
    }
    changes: dict[str, Any] = {
        "callbacks": callbacks,
        "evaluators": {"retrieval": {"type": "retrieval", "every_epochs": None}, "classification": None},
        "checkpoints": {"every_steps": 100, "keep_last": 1, "every_minutes": None},
    }
    rows = small_run(tmp_path, changes, steps=30)
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert result["step"] == len(rows) < 30 and list(result["stopped"]) == ["stop"]
    assert f"the run ends early at step {len(rows)}: callbacks.stop: loss: no better" in (run / "log.txt").read_text()
    assert "retrieval/student/image_to_text_R@1" in result["metrics"]
    best = min(range(len(rows)), key=lambda number: rows[number]["loss"]) + 1
    assert find_fault(run / "checkpoints" / "best") is None
    assert json.loads((run / "checkpoints/best/state.json").read_text())["step"] == best
    assert cosmos_ssl.load(run / "checkpoints" / "best").spec.embed_dim == 32
    student, average = (cosmos_ssl.load(run, which).model.state_dict() for which in ("student", "average"))  # type: ignore[arg-type]
    assert any(not torch.equal(student[name], average[name]) for name in student)
    found = cosmos_ssl.evaluate(run, "retrieval", which="average")["metrics"]
    in_run = {
        name.partition("/")[2]: x for name, x in result["metrics"].items() if name.startswith("retrieval/average")
    }
    assert found == pytest.approx({name: in_run[name] for name in found}) and len(found) >= 6
    cosmos_ssl.export(run, "openclip", tmp_path / "exported", which="average")
    exported = cosmos_ssl.load(tmp_path / "exported").model.state_dict()
    assert all(torch.equal(exported[name], average[name]) for name in exported if name.startswith("image."))
    for call in (cosmos_ssl.load, lambda *given: cosmos_ssl.evaluate(given[0], "retrieval", which=given[1])):
        with pytest.raises(UserError, match=r"holds no averag\. Did you mean 'average'\? It holds average, student"):
            call(run, "averag")
    assert len(small_run(tmp_path, changes, steps=30)) == len(rows)  # it is finished
    callbacks["stop"]["patience"] = 3
    del callbacks["best"]
    longer = small_run(tmp_path, changes, steps=30)
    assert len(rows) < len(longer) < 30 and longer[: len(rows)] == rows
    assert "callbacks: best: no longer in the config" in (run / "log.txt").read_text()
