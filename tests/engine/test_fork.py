"""A run that goes on from another one's checkpoint under a changed config."""

import json
import shutil

import pytest
import torch

from cosmos_ssl.engine.background import CheckpointWriter
from cosmos_ssl.engine.checkpoint import load_tensors
from cosmos_ssl.engine.fork import ask_fork
from cosmos_ssl.engine.run_folder import RunFolder
from cosmos_ssl.errors import CheckpointError, UserError

# 20 samples, batches of 4: 5 steps an epoch, 2 epochs; checkpoints after steps 3, 6, 9 and 10


@pytest.fixture(scope="module")
def old(tiny, tmp_path_factory):
    """The folder of a finished run that kept all its checkpoints, none of them late."""
    folder = tmp_path_factory.mktemp("old") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "_busy", lambda self: bool(self._collect()))
        tiny.make_trainer(
            folder, tiny.make_config(checkpoints={"every_steps": 3, "every_minutes": None, "keep_last": 9})
        ).train()
    return folder


def at(run_dir, step):
    return run_dir / "checkpoints" / f"step_{step:08d}"


def tensors(checkpoint):
    found = {role: load_tensors(checkpoint, role) for role in ("student", "teacher", "optimizer")}
    return {f"{role}.{name}": value for role, each in found.items() for name, value in each.items()}


class Killed(Exception):
    """What ends a run as if it were killed: nothing is saved after it."""


class Killer:
    """A writer that does so at the first row."""

    def scalars(self, step, values):
        self.trainer.run.between_steps = False
        raise Killed

    sync = close = lambda self: None


def fork(tiny, run_dir, source, config=None, **options):
    """The trainer of a run that goes on from ``source``, and the samples of each step that it will take."""
    RunFolder(run_dir).path.mkdir(parents=True, exist_ok=True)
    ask_fork(RunFolder(run_dir), source)
    return watched(tiny.make_trainer(run_dir, config, **options))


def watched(trainer):
    batches, seen = trainer.loader.batches, {}

    def noted(start, stop):
        for batch in batches(start, stop):
            seen[batch.step] = sorted(batch.views.keys)
            yield batch

    trainer.loader.batches = noted
    return trainer, seen


def samples(order, steps):
    return {step: sorted(f"s{index}" for index in order.batch(step)) for step in steps}


def test_it_starts_where_the_other_stood_and_goes_on_by_itself(tiny, old, rows, tmp_path):
    """Another learning rate: the same tensors, step and samples; then the same command goes on, with or without the
    source.
    """
    source, config, killer = tmp_path / "moved", tiny.make_config(optimizer={"lr": 0.1}), Killer()
    shutil.copytree(old, source)
    killer.trainer, _ = fork(tiny, tmp_path / "new", at(source, 3), config, writers=[killer])
    with pytest.raises(Killed):
        killer.trainer.train()
    taken, whole = tensors(at(tmp_path / "new", 3)), tensors(at(old, 3))
    assert taken.keys() == whole.keys() and all(torch.equal(taken[name], whole[name]) for name in whole)
    told = json.loads((tmp_path / "new" / "fork.json").read_text())
    assert told == {
        "checkpoint": str(at(source, 3)),
        "saved_step": 3,
        "step": 3,
        "changed": ["optimizer.lr: 0.05 -> 0.1"],
    }
    assert (
        f"forked from {source} at step 3 with optimizer.lr: 0.05 -> 0.1" in (tmp_path / "new" / "log.txt").read_text()
    )
    shutil.rmtree(source)
    trainer, seen = watched(tiny.make_trainer(tmp_path / "new", config))
    trainer.train()
    assert seen == samples(trainer.order, range(3, 10))
    assert [row["step"] for row in rows(tmp_path / "new")] == list(range(4, 11))
    assert rows(tmp_path / "new")[-1]["lr"] == pytest.approx(2 * rows(old)[-1]["lr"])


def test_without_a_change_it_is_the_run_that_was_never_forked(tiny, old, rows, tmp_path):
    fork(tiny, tmp_path / "new", at(old, 6))[0].train()
    assert rows(tmp_path / "new") == rows(old)[6:]
    new, whole = tensors(at(tmp_path / "new", 10)), tensors(at(old, 10))
    assert all(torch.equal(new[name], whole[name]) for name in whole)


def test_a_finished_run_gets_more_epochs(tiny, old, rows, tmp_path):
    with pytest.raises(UserError, match=r"stands at step 10, and this run would end at 10. Give more schedule.epochs"):
        fork(tiny, tmp_path / "new", old, tiny.make_config(optimizer={"lr": 0.1}))[0].train()
    assert not (tmp_path / "new" / "fork.json").exists() and not (tmp_path / "new" / "identity.json").exists()
    config = tiny.make_config(schedule={"epochs": 3, "warmup_steps": 2})
    fork(tiny, tmp_path / "new", old, config)[0].train()
    assert [row["step"] for row in rows(tmp_path / "new")] == [11, 12, 13, 14, 15]
    fork(tiny, tmp_path / "new", old, config)[0].train()  # finished: the command with the source says so, too
    assert len(rows(tmp_path / "new")) == 5


def test_another_batch_size(tiny, old, rows, tmp_path):
    """At an epoch's end any; within one what divides the samples behind, in the same sequence."""
    double = {"training": {"batch_size": 10, "precision": "fp32", "device": "cpu", "seed": 3}}
    tiny.make_trainer(
        tmp_path / "five", tiny.make_config(schedule={"epochs": 2, "warmup_steps": 2, "max_steps": 5})
    ).train()
    trainer, seen = fork(tiny, tmp_path / "new", tmp_path / "five", tiny.make_config(**double))
    trainer.train()
    assert seen == samples(trainer.order, range(2, 4)) and {key for keys in seen.values() for key in keys} == {
        f"s{i}" for i in range(20)
    }
    within = {"training": {"batch_size": 2, "precision": "fp32", "device": "cpu", "seed": 3}}
    with pytest.raises(UserError, match=r"step 3 lies within an epoch, where the order .* loader.lanes=4"):
        fork(tiny, tmp_path / "other", at(old, 3), tiny.make_config(**within))[0].train()
    source = tmp_path / "lanes"
    lanes = {"loader": {"workers": 0, "lanes": 2}}
    tiny.make_trainer(
        source, tiny.make_config(**lanes, schedule={"epochs": 2, "warmup_steps": 2, "max_steps": 3})
    ).train()
    trainer, seen = fork(tiny, tmp_path / "halved", source, tiny.make_config(**lanes, **within))
    trainer.train()
    assert [row["step"] for row in rows(tmp_path / "halved")] == list(range(7, 21))
    whole = tiny.make_trainer(tmp_path / "x", tiny.make_config(**lanes)).order
    for step in (3, 4):  # two batches of the new run are one of the old
        assert sorted(seen[2 * step] + seen[2 * step + 1]) == samples(whole, [step])[step]
    with pytest.raises(
        UserError, match=r"12 samples of an epoch are behind, which training.batch_size=10 does not divide"
    ):
        fork(tiny, tmp_path / "third", source, tiny.make_config(**lanes, **double))[0].train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": {"type": "none"}},
            r"teacher.type: 'ema' -> 'none': weights, teacher and optimiser are taken over",
        ),
        (
            {"optimizer": {"type": "timm", "name": "lion"}},
            r"optimizer.type: 'adamw' -> 'timm': weights, teacher and optimiser are taken over",
        ),
        (
            {"model": {"pretrained": "x.pt"}},
            r"model.pretrained: null -> 'x.pt': weights, teacher and optimiser are taken over",
        ),
        (
            {"training": {"seed": 4, "batch_size": 4, "precision": "fp32", "device": "cpu"}},
            r"lies within an epoch, .* training.seed=3",
        ),
        ({"data": {"type": "numbers", "bad": 1}}, None),
    ],
)
def test_what_may_change(tiny, tmp_path, changes, message):
    source = tmp_path / "source"
    short = {"schedule": {"epochs": 2, "warmup_steps": 2, "max_steps": 3}, "teacher": {"type": "ema"}}
    tiny.make_trainer(source, tiny.make_config(**short)).train()
    trainer, _ = fork(tiny, tmp_path / "new", source, tiny.make_config(**{"teacher": {"type": "ema"}, **changes}))
    if message is None:
        trainer.train()
        return
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert not (tmp_path / "new" / "fork.json").exists()


def test_a_model_that_does_not_fit_leaves_the_folder_free(tiny, old, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "WIDTH", 8)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        fork(tiny, tmp_path / "new", at(old, 6), tiny.make_config(optimizer={"lr": 0.1}))[0].train()
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {".lock", "log.txt"}


def test_other_data_must_be_accepted(tiny, old, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "SAMPLES", 24)
    with pytest.raises(
        UserError, match=r"the data are not those of .*data, samples: 20 -> 24.* loader.changed_data=accept"
    ):
        fork(tiny, tmp_path / "new", at(old, 3))[0].train()
    accept = {"loader": {"workers": 0, "changed_data": "accept"}}
    trainer, seen = fork(tiny, tmp_path / "new", at(old, 3), tiny.make_config(**accept))
    trainer.train()
    assert list(seen) == list(range(3, 12))


def test_folders_that_cannot_be_a_fork(tiny, old, tmp_path):
    with pytest.raises(UserError, match="is the run folder itself"):
        ask_fork(RunFolder(old), at(old, 3))
    tiny.make_trainer(tmp_path / "own").train()
    with pytest.raises(UserError, match=r"run folder .*own is no fork of .*run. Give another output_dir"):
        ask_fork(RunFolder(tmp_path / "own"), old)
    (tmp_path / "own" / "fork.json").write_text("[]")
    with pytest.raises(UserError, match=r"fork\.json is damaged"):
        ask_fork(RunFolder(tmp_path / "own"), old)
    with pytest.raises(CheckpointError, match="no run folder with a sound checkpoint"):
        ask_fork(RunFolder(tmp_path / "new"), tmp_path)
    shutil.copytree(old, tmp_path / "bent")
    (at(tmp_path / "bent", 6) / "student.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step_00000006 cannot be used: student.safetensors has 0 bytes"):
        ask_fork(RunFolder(tmp_path / "new"), at(tmp_path / "bent", 6))


def test_several_ranks_fork_as_one(tiny, old, rows, ranks, finished, tmp_path):
    run = tmp_path / "new"
    run.mkdir()
    ask_fork(RunFolder(run), at(old, 6))
    codes, said = finished(ranks(run, 2, optimizer={"lr": 0.1}))
    assert codes == [0, 0], said
    assert [row["step"] for row in rows(run) if "loss" in row] == [7, 8, 9, 10]
