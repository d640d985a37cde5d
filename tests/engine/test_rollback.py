"""A loss that rises for good: when that is seen, to where a run goes back, and that it goes on exactly from there."""

import io
import json
import math
import shutil

import fsspec
import numpy as np
import pytest
import torch
from rich.console import Console

from cosmos_ssl.config.sections import RollbackConfig
from cosmos_ssl.data.order import Order
from cosmos_ssl.engine import trainer as trainer_module
from cosmos_ssl.engine.background import CheckpointWriter
from cosmos_ssl.engine.checkpoint import checkpoint_folders, load_tensors
from cosmos_ssl.engine.fork import ask_fork
from cosmos_ssl.engine.remote import Remote
from cosmos_ssl.engine.rollback import Record, Rollback, needed, write_records
from cosmos_ssl.engine.run_folder import RunFolder
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.errors import TrainingError, UserError
from cosmos_ssl.files import checkpoint_folder

ROLES = ("student", "teacher", "optimizer")
ROLLBACK = {"factor": 1.5, "patience": 3, "most": 2}


def seen(losses, **settings):
    """After how many of these losses a rise is seen first."""
    watched = Rollback(RollbackConfig(**{"patience": 10, "factor": 1.5} | settings), Order([100], 4, seed=0))
    for number, loss in enumerate(losses, 1):
        watched.observe(loss)
        if watched.rise() is not None:
            return number
    return None


def test_when_a_loss_has_risen():
    noise = np.random.default_rng(0).normal(0, 0.1, 300)
    falling = 4 * np.exp(-np.arange(300) / 100) + 1 + noise
    assert seen(falling) is None
    spike = falling.copy()
    spike[150:155] += 10  # half of ``patience``: it recovers
    assert seen(spike) is None
    spike[155:] += 10
    assert seen(spike) == 156  # with the sixth of ten
    spike[155:] = math.nan
    assert seen(spike) == 156
    assert seen(falling - 8 + 5 * (np.arange(300) >= 200)) == 206  # of a negative loss by half of its size
    assert seen(noise * 5, patience=50) is None  # about 0 a median is any multiple of another
    assert seen([1.0] * 10 + [9.0] * 9) is None and seen([1.0] * 10 + [9.0] * 10) == 20  # not before there is a level
    drift = 1 + np.arange(300) * 0.002
    assert seen(drift) is None


@pytest.mark.parametrize("shuffled", [8, 100])
def test_an_order_with_batches_left_out(shuffled):
    order, plain = (Order([13, 30], 4, lanes=2, shuffle_samples=shuffled, seed=5) for _ in range(2))
    order.skipped = ((3, 4), (12, 1))
    places = [*range(3), *range(7, 16), *range(17, 25)]
    again = order.__reduce__()
    for each in (order, again[0](*again[1])):
        assert [each.place(step) for step in range(20)] == places
        for step, place in enumerate(places):
            assert each.batch(step).tolist() == plain.batch(place).tolist()
            assert each.rank_batch(step, 1, 2).tolist() == plain.rank_batch(place, 1, 2).tolist()
            assert each.rank_positions(step, 1, 2).tolist() == plain.rank_positions(place, 1, 2).tolist()


def test_records_add_up():
    """A second way back from behind the first goes past all that was seen; one to before it takes its place."""
    watched = Rollback(RollbackConfig(patience=2), Order([100], 4, seed=0))
    watched.take([Record(found=20, at=16, batches=4), Record(found=30, at=26, batches=4)])
    assert watched.order.skipped == ((16, 4), (26, 4))
    watched.take([Record(found=20, at=16, batches=4), Record(found=18, at=14, batches=8)])
    assert watched.order.skipped == ((14, 8),)


@pytest.mark.parametrize("every", [1, 10, 37, 90])
def test_a_checkpoint_that_is_old_enough_is_kept(every):
    steps, reach = {0}, 40
    for step in range(every, 1000, every):
        old = max(each for each in steps if each <= max(step - reach, 0))  # before the write, as after it
        assert step - old <= 2 * reach + 2 * every
        steps.add(step)
        steps = needed(sorted(steps), reach) | set(sorted(steps)[-1:])
        assert len(steps) <= 3 and min(steps) <= max(step - reach, 0)


def sections(rollback=ROLLBACK, max_steps=30, lr=0.003, **checkpoints):
    return {
        "schedule": {"type": "constant", "epochs": 9, "warmup_steps": 2, "max_steps": max_steps},
        "optimizer": {"lr": lr, "weight_decay": 0.1},
        "training": {"batch_size": 4, "precision": "fp32", "device": "cpu", "seed": 3, "rollback": rollback},
        "checkpoints": {"every_steps": 4, "every_minutes": None, "keep_last": 1} | checkpoints,
    }


@pytest.fixture
def train(tiny):
    """Train where the loss is high on the batches ``bad``; what was said, and the batches that were taken."""

    def train(run_dir, bad=(22, 23), writers=(), **given):
        said, seen = io.StringIO(), []
        trainer = tiny.make_trainer(
            run_dir,
            tiny.make_config(**sections(**given)),
            Console(file=said, width=400),
            evaluators={"mean": tiny.Mean()},
            callbacks={"shake": tiny.Shake()},
            writers=writers,
        )
        tiny.raise_loss(trainer, bad, seen)
        trainer.train()
        return said.getvalue(), seen

    return train


def state(folder):
    newest = checkpoint_folders(folder)[-1]
    tensors = {f"{role}.{n}": x for role in ROLES for n, x in load_tensors(newest, role).items()}
    return tensors, json.loads((newest / "state.json").read_text())["callbacks"]


def same(one, other):
    (found, told), (expected, known) = state(one), state(other)
    return told == known and all(torch.equal(found[name], expected[name]) for name in expected | found)


def without(rows):
    return [{name: value for name, value in row.items() if name != "rollbacks"} for row in rows]


class Lost(BaseException):
    """The process is gone: nothing is saved."""


def losing(owner, name, monkeypatch, *, before, calls=1):
    """Let a function raise Lost, before or after its work, at the so manieth call."""
    whole, left = getattr(owner, name), [calls]

    def lost(*given, **named):
        left[0] -= 1
        if before and not left[0]:
            raise Lost
        found = whole(*given, **named)
        if not left[0]:
            raise Lost
        return found

    monkeypatch.setattr(owner, name, lost)


def told(tiny, folder, **record):
    """A run that is told to pass over the samples from its start."""
    folder.mkdir(exist_ok=True)
    write_records(folder, [Record(**record, level=1.0)])
    config = tiny.make_config(**sections(rollback=None))
    parts = {"evaluators": {"mean": tiny.Mean()}, "callbacks": {"shake": tiny.Shake()}}
    tiny.make_trainer(folder, config, **parts).train()
    return folder


@pytest.fixture(scope="session")
def never(tiny, tmp_path_factory):
    """The run that never saw the bad batches."""
    return told(tiny, tmp_path_factory.mktemp("never"), found=24, at=18, batches=6)


def test_back_to_the_very_start(tiny, train, rows, tmp_path):
    """What the optimiser held by then is gone."""
    assert train(tmp_path / "a", bad=(7, 8))[1] == [*range(9), 0, 1, 2, *range(9, 36)]
    told(tiny, tmp_path / "b", found=9, at=3, batches=6)
    assert without(rows(tmp_path / "a")) == rows(tmp_path / "b") and same(tmp_path / "a", tmp_path / "b")


def test_a_run_goes_back_and_on(tiny, train, rows, never, tmp_path):
    """It becomes the run that passes over the bad batches, and its rows are those of the way that stays."""
    tracker = tiny.Tracker()
    said, seen = train(tmp_path, writers=[tracker])
    assert "the loss has risen: over the last 3 steps its median is" in said and "goes back from step 24;" in said
    assert "from step 18 on the samples of 6 batches are passed over (rollback 1 of at most 2)" in said
    assert seen == [*range(24), 16, 17, *range(24, 36)]
    found = rows(tmp_path)
    assert without(found) == rows(never) and same(tmp_path, never)
    assert [row["rollbacks"] for row in found if "loss" in row] == [0.0] * 16 + [1.0] * 14  # every step once
    assert found[-2]["epoch"] == 6 and sum("mean/student/mean" in row for row in found) == 6
    assert tracker.check(tmp_path, rows) == [("", 1, 24), ("2", 17, 30)]


@pytest.mark.parametrize("stage", ["found", "removed", "noted", "restored", "behind"])
def test_killed_on_the_way_back(tiny, train, rows, never, tmp_path, monkeypatch, stage):
    tracker = tiny.Tracker()
    with monkeypatch.context() as patch:
        if stage == "found":
            losing(CheckpointWriter, "go_back", patch, before=True)
        elif stage == "removed":
            losing(trainer_module, "write_records", patch, before=True)
        elif stage == "noted":
            losing(trainer_module, "write_records", patch, before=False)
        elif stage == "restored":
            losing(Rollback, "note", patch, before=False)
        else:  # two steps behind the window, before the next checkpoint
            losing(RunState, "snapshot", patch, before=True, calls=8)
        with pytest.raises(Lost):
            train(tmp_path, writers=[tracker])
    said, seen = train(tmp_path, writers=[tracker])
    assert tracker.check(tmp_path, rows)[0] == ("", 1, 24)
    assert ("goes back" in said) == (stage in ("found", "removed")) and (22 in seen) == (stage == "removed")
    assert without(rows(tmp_path)) == rows(never) and same(tmp_path, never)


def test_a_rise_that_comes_again_and_the_end_of_patience(train, tmp_path):
    said, seen = train(tmp_path / "twice", bad=range(22, 27))
    assert "from step 18 on the samples of 2 batches are passed over (rollback 2 of at most 2)" in said
    assert seen == [*range(24), 16, 17, 24, 25, 16, 17, *range(26, 38)]
    match = (
        r"step 20: the loss has risen from .* after the run has gone back 2 times, as often as training.rollback.most"
    )
    for _ in range(2):  # the same command comes to the same
        with pytest.raises(TrainingError, match=match):
            train(tmp_path / "ever", bad=range(22, 60))
    assert "goes back" not in train(tmp_path / "ever", bad=(), rollback=None)[0]  # what is passed over stays so
    match = r"has no sound checkpoint of its first 18 steps for that"
    with pytest.raises(TrainingError, match=match):
        train(tmp_path / "none", writers=[Removing(tmp_path / "none")])


class Removing:
    """Removes the checkpoints of a run that are old."""

    def __init__(self, run_dir):
        self.run_dir = run_dir

    def scalars(self, step, values):
        for path in checkpoint_folders(self.run_dir)[:-1] if step > 20 else ():
            shutil.rmtree(path)

    def pictures(self, step, pictures):
        pass

    sync = close = lambda self: None


@pytest.mark.parametrize(("kind", "back"), [("replicate", 16), ("fsdp", 15)])  # this one saves before it evaluates
def test_ranks_go_back_together(ranks, finished, tmp_path, rows, kind, back):
    own = sections()
    own["training"]["parallel"] = kind
    codes, said = finished(ranks(tmp_path, 2, **own, raised=[22, 23]))
    assert codes == [0, 0] and "goes back from step 24; from step 18 on the samples of 6 batches" in said[0], said
    assert "goes back from step 24;" in (tmp_path / "log.rank1.txt").read_text()
    assert [row["rollbacks"] for row in rows(tmp_path) if "loss" in row] == [0.0] * back + [1.0] * (30 - back)


def test_a_longer_run_and_a_fork_of_one_that_went_back(train, tmp_path):
    """Both go on in the order of samples as it stood."""
    train(tmp_path / "run")
    said, seen = train(tmp_path / "run", max_steps=34)
    assert seen == [*range(36, 40)] and "prolonged to 34, from step 30 on" in said
    for rollback in (ROLLBACK, None):
        fork = RunFolder(tmp_path / f"fork{rollback is None}")
        fork.path.mkdir()
        ask_fork(fork, tmp_path / "run")
        assert train(fork.path, max_steps=38, lr=0.002, rollback=rollback)[1] == [*range(40, 44)]


def test_files_that_are_damaged(train, tmp_path):
    train(tmp_path)
    (tmp_path / "result.json").unlink()
    for content in ('{"rollbacks": [{"found": -1, "at": 0, "batches": 1}]}', '{"rollbacks": [3]}', "{}", "x"):
        (tmp_path / "rollbacks.json").write_text(content)
        with pytest.raises(
            UserError, match=r"rollbacks.json .*delete it, and the newest checkpoint tells what it knew"
        ):
            train(tmp_path)


@pytest.fixture
def system():
    """Fsspec's memory, empty before and after."""
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def test_copies_follow(train, rows, never, tmp_path, system, monkeypatch):
    """A run that went back goes on elsewhere, from no copy of the way that it left."""
    url, every = "memory://b/run", {"every_steps": 2, "keep_last": 100}
    with monkeypatch.context() as patch:
        losing(CheckpointWriter, "go_back", patch, before=True)
        with pytest.raises(Lost):
            train(tmp_path / "here", copy_to=url, **every)
    train(tmp_path / "here", **every)
    assert max(Remote(url).whole()) == 24
    Remote(url).send(checkpoint_folder(tmp_path / "here", 20), tmp_path / "here")  # the one that knows of the way back
    said, seen = train(tmp_path / "there", copy_to=url, **every)
    assert (
        "the checkpoint of step 20 was fetched" in said and "step 14 was fetched" in said and seen == [*range(26, 36)]
    )
    assert without(rows(tmp_path / "there")) == rows(never) and same(tmp_path / "there", never)
    assert all(Remote(url).state(step)["rollback"]["records"] for step in Remote(url).whole() if step > 18)


def test_copies_of_the_run_itself_follow(train, rows, never, tmp_path, system):
    """In the process that goes back, copies are made again and the older ones are removed."""
    url = "memory://b/run"
    train(tmp_path / "here", copy_to=url)
    assert list(Remote(url).whole()) == [int(path.name[5:]) for path in checkpoint_folders(tmp_path / "here")]
    assert all(Remote(url).state(step)["rollback"]["records"] for step in Remote(url).whole())


def test_a_longer_run_fetches_what_it_can_go_on_from(tiny, rows, tmp_path, system, monkeypatch):
    """Not the end of the shorter run, which has shaped what came last; nor when it is started again."""
    url = "memory://b/run"

    def prolong(folder, max_steps, copy_to):
        schedule = {"type": "warmup_stable_decay", "decay_steps": 2, "epochs": 9, "max_steps": max_steps}
        kept = {"every_steps": 2, "keep_last": 1, "copy_to": copy_to}
        said = io.StringIO()
        own = tiny.make_config(schedule=schedule, checkpoints=kept)
        tiny.make_trainer(folder, own, Console(file=said, width=400)).train()
        return said.getvalue()

    prolong(tmp_path / "whole", 11, None)
    prolong(tmp_path / "short", 6, url)
    assert list(Remote(url).whole()) == [4, 6]
    with monkeypatch.context() as patch:
        losing(RunState, "snapshot", patch, before=True)
        with pytest.raises(Lost):
            prolong(tmp_path / "elsewhere", 11, url)
    assert "prolonged" not in prolong(tmp_path / "elsewhere", 11, url)
    assert "step 4 was fetched" in (tmp_path / "elsewhere/log.txt").read_text()
    assert rows(tmp_path / "elsewhere") == rows(tmp_path / "whole")
    assert list(Remote(url).whole()) == [9, 11]
