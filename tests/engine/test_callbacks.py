"""Callbacks in a run, and writers of its config: order, state, resuming, keeping, ending early, failing."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from cosmos_ssl import api
from cosmos_ssl.engine.checkpoint import checkpoint_folders, find_fault, load_tensors, read_state
from cosmos_ssl.engine.metrics import Writers, read_rows
from cosmos_ssl.errors import PluginError


class Book(api.Writer):
    """Notes what it is given; fails at ``failing`` calls, by number."""

    def __init__(self, failing=(), error=RuntimeError, appends=False):
        self.failing, self.error, self.calls, self.entries, self.runs = set(failing), error, 0, [], []
        self.appends = appends
        self.part_name = "book"

    def _called(self):
        self.calls += 1
        if self.calls in self.failing:
            raise self.error("no ink")

    def start(self, run):
        self._called()
        self.runs.append(run)

    def scalars(self, step, values):
        self._called()
        self.entries += [(step, name) for name in values]

    def pictures(self, step, pictures):
        self._called()
        self.entries += [(step, name) for name in pictures]

    def close(self):
        self._called()


RUN = api.RunInfo(folder=None, name="x", id="0", step=0)


@pytest.mark.parametrize(
    ("failing", "error", "told", "entries"),
    [
        ([1], RuntimeError, 1, [1, 2, 3, 4, 5, 6]),  # it is started again
        ([3], RuntimeError, 1, [1, 3, 4, 5, 6]),
        ([2, 3, 4], RuntimeError, 2, []),  # left alone
        ([2, 3, 4, 5], OSError, 1, [5, 6]),  # a disk may come back
        ([2], SystemExit, 1, [2, 3, 4, 5, 6]),
    ],
)
def test_a_writer_that_fails_costs_a_warning(failing, error, told, entries, caplog):
    book = Book(failing, error)
    writers = Writers([book], RUN)
    for step in range(1, 7):
        writers.scalars(step, {"loss": 1.0})
    writers.close()
    assert [step for step, _ in book.entries] == entries
    assert len(caplog.records) == told and "logging.writers.book cannot write: no ink" in caplog.text


def test_what_python_gives_is_not_held_back():
    class Broken:
        def scalars(self, step, values):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Writers([Broken()]).scalars(1, {"loss": 1.0})


class Stop(Exception):
    """What a test throws into a run."""


class Crash(api.Callback):
    """Fails before a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def before_step(self, ctx):
        if ctx.progress.step == self.step:
            raise Stop


def states(run_dir):
    newest = checkpoint_folders(run_dir)[-1]
    found = {role: load_tensors(newest, role) for role in ("student", "teacher", "optimizer", "shake")}
    return {f"{role}.{n}": x for role, each in found.items() for n, x in each.items()}, read_state(newest)["callbacks"]


def test_crashed_and_resumed_equals_never_crashed(tiny, rows, tmp_path):
    options = lambda: {"evaluators": {"mean": tiny.Mean()}}  # noqa: E731
    whole, book = tiny.Shake(), Book(appends=True)
    config = tiny.make_config(checkpoints={"every_steps": 5})  # before what is evaluated and called at the same step
    tiny.make_trainer(tmp_path / "whole", config, callbacks={"shake": whole}, **options()).train()
    assert whole.hooks[:4] == [("start", 0), ("checkpoint", 5), ("epoch", 5), ("checkpoint", 10)]
    ids = set()
    for at in (2, 5, 8, 7, None):  # from the last crash on step 8 comes for the third time
        crash = {} if at is None else {"crash": Crash(at)}
        trainer = tiny.make_trainer(tmp_path / "cut", config, callbacks={"shake": tiny.Shake(), **crash}, **options())
        object.__setattr__(trainer.assembly, "writers", {"book": book})
        if at is None:
            trainer.train()
        else:
            with pytest.raises(Stop):
                trainer.train()
        ids.add(book.runs[-1].id)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    (tensors, plain), (wanted, as_plain) = states(tmp_path / "cut"), states(tmp_path / "whole")
    assert plain["states"]["shake"] == as_plain["states"]["shake"]
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert len(ids) == 1 and len(next(iter(ids))) == 16
    named = [(row["step"], name) for row in read_rows(tmp_path / "cut" / "metrics.jsonl") for name in row]
    assert {(step, name) for step, name in named if name != "step"} <= set(book.entries)
    losses = [step for step, name in book.entries if name == "loss"]
    assert losses == sorted(set(losses))  # steps that came again were not given again


def test_a_run_that_is_ended_early_is_finished(tiny, rows, tmp_path):
    config = tiny.make_config(callbacks={"shake": {"type": "tests:shake"}}, checkpoints={"every_steps": 100})
    evaluators = {"mean": tiny.Mean()}
    trainer = tiny.make_trainer(tmp_path, config, callbacks={"shake": tiny.Shake(last=5)}, evaluators=evaluators)
    metrics = trainer.train()
    assert "mean/student/mean" in metrics and max(row["step"] for row in rows(tmp_path)) == 5
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 5 and result["stopped"] == {"shake": {"type": "tests:shake"}}
    assert "the run ends early at step 5: callbacks.shake: enough" in (tmp_path / "log.txt").read_text()
    kept = tmp_path / "checkpoints" / "shake"
    assert find_fault(kept) is None and read_state(kept)["step"] == 5
    again = tiny.make_trainer(
        tmp_path, config, callbacks={"shake": tiny.Shake(last=5)}, console=Console(file=StringIO())
    )
    assert again.train() == metrics
    assert "is finished (step 5)" in again.console.file.getvalue().replace("\n", "")


def test_failures_name_the_callback(tiny, tmp_path):
    class Broken(tiny.Shake):
        part_source = "my-callbacks 1.0"

        def after_step(self, ctx):
            raise KeyError("x")

    with pytest.raises(PluginError, match=r"callbacks.bad \(my-callbacks 1.0\) failed: KeyError: 'x'"):
        tiny.make_trainer(tmp_path, callbacks={"bad": Broken()}).train()
