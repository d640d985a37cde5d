"""Runs that are made longer: the same as if they had been so from the start, or refused with the reason."""

import io

import pytest
import torch
from rich.console import Console

from cosmos_ssl.engine.checkpoint import checkpoint_folders, load_tensors
from cosmos_ssl.errors import CheckpointError, UserError
from cosmos_ssl_plugins.schedules.ways import Cosine

STABLE = {"type": "warmup_stable_decay", "decay_steps": 2, "epochs": 9}


def train(tiny, folder, max_steps, schedule=STABLE, writers=(), **sections):
    """Train so many steps; what was said."""
    said = io.StringIO()
    config = tiny.make_config(schedule={**schedule, "max_steps": max_steps}, **sections)
    tiny.make_trainer(folder, config, Console(file=said, width=300), writers=writers).train()
    return said.getvalue()


def steps(folder):
    return [int(path.name[5:]) for path in checkpoint_folders(folder)]


def weights(folder):
    roles = ("student", "teacher", "optimizer")
    return {f"{role}.{n}": x for role in roles for n, x in load_tensors(checkpoint_folders(folder)[-1], role).items()}


@pytest.mark.parametrize(
    ("schedule", "first", "begin"),
    [
        (STABLE, 6, 4),  # to its end: back to where its decay began
        ({**STABLE, "decay_steps": 5}, 8, 3),
        ({"type": "constant", "epochs": 9}, 6, 6),
        ({"type": "step", "at": [3, 8], "epochs": 9}, 6, 6),
        ({"type": "cosine", "over_steps": 4, "epochs": 9}, 6, 6),
    ],
)
def test_a_longer_run_is_the_one_that_was_so_from_the_start(tiny, rows, tmp_path, schedule, first, begin):
    train(tiny, tmp_path / "whole", 11, schedule)
    tracker = tiny.Tracker()
    train(tiny, tmp_path / "cut", first, schedule, writers=[tracker])
    assert begin in steps(tmp_path / "cut")
    said = train(tiny, tmp_path / "cut", 11, schedule, writers=[tracker])
    assert f"the run of {first} steps is prolonged to 11, from step {begin} on" in said
    assert (f"step_{first:08d}.shorter" in said) == (begin < first) and "damaged" not in said
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    replaced = [("", 1, first), ("2", begin + 1, 11)]
    assert tracker.check(tmp_path / "cut", rows) == (replaced if begin < first else [("", 1, 11)])
    found, expected = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "is finished (step 11)" in train(tiny, tmp_path / "cut", 11, schedule)


def test_a_run_is_prolonged_before_its_end_and_twice(tiny, rows, tmp_path):
    train(tiny, tmp_path / "whole", 12)
    for length in (5, 8, 12):
        train(tiny, tmp_path / "cut", length)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_what_depends_on_the_length_is_named(tiny, tmp_path):
    train(tiny, tmp_path / "a", 6)
    with pytest.raises(UserError, match="it has 6 steps, and a run may only grow: 4 are asked for"):
        train(tiny, tmp_path / "a", 4)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.05 -> 1\.0"):
        train(tiny, tmp_path / "a", 9, optimizer={"lr": 1.0})
    train(tiny, tmp_path / "b", 6, {"epochs": 9})
    depends = (
        r"max_steps: 6 -> 8\): what it has done depends on its length, by schedule\.type\. Give another output_dir"
    )
    with pytest.raises(UserError, match=depends):
        train(tiny, tmp_path / "b", 8, {"epochs": 9})
    train(tiny, tmp_path / "c", 6, optimizer={"weight_decay_end": 0.2})
    with pytest.raises(UserError, match=r"depends on its length, by optimizer\.weight_decay_end"):
        train(tiny, tmp_path / "c", 8, optimizer={"weight_decay_end": 0.2})


def test_a_teacher_whose_momentum_depends_on_the_length_is_named(tiny, tmp_path):
    def trainer(length):
        made = tiny.make_trainer(tmp_path, tiny.make_config(schedule={**STABLE, "max_steps": length}))
        made.assembly.teacher.scheduled = tiny.Curve(type="cosine", start=0.9, end=1.0).follow(Cosine(None))
        return made

    trainer(6).train()
    with pytest.raises(UserError, match="depends on its length, by teacher"):
        trainer(8).train()


def test_the_checkpoint_to_go_on_from_must_be_there_and_sound(tiny, tmp_path):
    train(tiny, tmp_path / "a", 6)
    (tmp_path / "a/checkpoints/step_00000004/state.json").write_text("{")
    (tmp_path / "a/checkpoints/step_00000003").exists() and (tmp_path / "a/checkpoints/step_00000003").rename(
        tmp_path / "x"
    )
    with pytest.raises(CheckpointError, match="no sound checkpoint of its first 4 steps is left"):
        train(tiny, tmp_path / "a", 9)
    (tmp_path / "a/checkpoints/step_00000004").rename(tmp_path / "y")
    with pytest.raises(UserError, match=r"no checkpoint of them is left: there are 6"):
        train(tiny, tmp_path / "a", 9)
