"""Checkpoint folders: exact, whole or not there, verified, and never all lost."""

import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cosmos_ssl.config import CheckpointsConfig
from cosmos_ssl.engine.background import CheckpointWriter
from cosmos_ssl.engine.checkpoint import (
    Snapshot,
    checkpoint_folders,
    find_fault,
    latest_checkpoint,
    load_exactly,
    load_tensors,
    read_state,
    save_checkpoint,
)
from cosmos_ssl.errors import CheckpointError, StorageError, TrainingError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.randn(3, dtype=torch.bfloat16),
    "flag": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


def snapshot(step):
    return Snapshot(
        step=step, tensors={"student": TENSORS, "optimizer": {"a.exp_avg": TENSORS["a"]}}, state={"step": step}
    )


def steps(run_dir):
    return [int(path.name[5:]) for path in checkpoint_folders(run_dir)]


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def writer(run_dir, sound=None, **settings):
    return CheckpointWriter(run_dir, CheckpointsConfig(**settings), 5, 100, sound=sound)


def test_what_is_written_is_read_and_is_true_safetensors(tmp_path):
    path = save_checkpoint(tmp_path, snapshot(12))
    assert path == tmp_path / "checkpoints/step_00000012"
    assert {p.name for p in path.iterdir()} == {
        "student.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    for found in (load_tensors(path, "student"), load_file(path / "student.safetensors")):
        assert set(found) == set(TENSORS)
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items()
        )
    assert read_state(path)["step"] == 12
    assert find_fault(path) is None


def test_damage_is_seen_and_the_one_before_is_taken(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, snapshot(step))
    folder = tmp_path / "checkpoints"
    blob = bytearray((folder / "step_00000004/student.safetensors").read_bytes())
    blob[-1] ^= 1
    (folder / "step_00000004/student.safetensors").write_bytes(blob)
    (folder / "step_00000003/optimizer.safetensors").unlink()
    (folder / "step_00000002/manifest.json").write_text("{")
    assert latest_checkpoint(tmp_path) == folder / "step_00000001"
    assert "has changed since it was written" in caplog.text
    assert "optimizer.safetensors is missing" in caplog.text
    assert "manifest.json cannot be read" in caplog.text
    os.truncate(folder / "step_00000001/state.json", 3)
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_missing_role_and_a_swapped_file_are_named(tmp_path):
    path = save_checkpoint(tmp_path, snapshot(1))
    with pytest.raises(CheckpointError, match=r"holds no teacher. It holds optimizer, student"):
        load_tensors(path, "teacher")
    shutil.copy(path / "student.safetensors", path / "teacher.safetensors")
    with pytest.raises(CheckpointError, match="says that it holds the student, not the teacher"):
        load_tensors(path, "teacher")
    (path / "student.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"student\.safetensors cannot be read"):
        load_tensors(path, "student")
    (path / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="is not of format 1"):
        read_state(path)


def test_loading_is_exact_and_lists_the_first_differences():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    good = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    load_exactly(module, good, "x")
    assert torch.equal(module[0].weight, torch.ones(3, 2))
    bad = {"0.weight": torch.ones(3, 5), "other": torch.ones(1)}
    with pytest.raises(CheckpointError) as error:
        load_exactly(module, bad, "file.safetensors")
    said = str(error.value)
    assert said.startswith(
        "file.safetensors does not fit the model: 0.bias is missing; 1.weight is missing; 1.bias is missing; "
        "other is unknown"
    )
    assert said.endswith("and 1 more") and "\n" not in said


def test_old_ones_go_and_epoch_ones_stay(tmp_path):
    background = writer(tmp_path, keep_every_epochs=2)
    for step in (5, 10, 15, 20, 25, 30, 31):
        background.write(snapshot(step))
    background.wait(31)
    background.close()
    assert steps(tmp_path) == [10, 20, 30, 31]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_not_written(tmp_path, dtype):
    mask = torch.full((2, 2), -torch.inf, dtype=dtype)
    held = {"mask": mask, "least": torch.tensor(torch.inf, dtype=dtype)}
    good = Snapshot(step=1, tensors={"student": TENSORS, "teacher": held}, state={"step": 1}, buffers=held)
    assert find_fault(save_checkpoint(tmp_path, good)) is None
    for name, number, buffers in (
        ("mask", -torch.inf, ()),
        ("mask", torch.nan, {"mask"}),
        ("weight", torch.inf, {"mask"}),
    ):
        bad = torch.ones(3, 4, dtype=dtype)
        bad[1, 2] = number
        wrong = Snapshot(step=2, tensors={"student": TENSORS, "teacher": {name: bad}}, state={}, buffers=buffers)
        with pytest.raises(TrainingError, match=f"^{name} of the teacher is not finite$"):
            save_checkpoint(tmp_path, wrong)
    assert names(tmp_path) == ["step_00000001"]


def test_one_after_a_skipped_update_displaces_none(tmp_path):
    background = writer(tmp_path, keep_last=1)
    for one in (snapshot(1), replace(snapshot(2), settled=False), replace(snapshot(3), settled=False)):
        background.write(one)
    background.wait(3)
    assert steps(tmp_path) == [1, 2, 3]
    background.write(snapshot(4))
    background.close()
    assert steps(tmp_path) == [4]


def test_a_full_disk_is_survived_and_the_old_one_stays(tmp_path, monkeypatch, caplog):
    background = writer(tmp_path, keep_last=1)
    background.write(snapshot(1))
    background.wait(1)
    real = os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    background.write(snapshot(2))
    with pytest.raises(
        StorageError,
        match=r"checkpoint of step 2 could not be written .*No space left.*the last sound one is of step 1",
    ):
        background.wait(2)
    assert names(tmp_path) == ["step_00000001"]
    monkeypatch.setattr(os, "fsync", real)
    background.write(snapshot(3))
    background.wait(3)
    background.close()
    assert steps(tmp_path) == [3]


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, monkeypatch, caplog):
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(sum(x.nbytes for x in TENSORS.values())))
    background = writer(tmp_path)
    assert not background.fault
    background.write(snapshot(1))
    while not background.fault:
        time.sleep(0.01)
    assert names(tmp_path) == []
    assert re.search(
        r"checkpoint of step 1 could not be written \(.*MiB needed, .* MiB free.*\), there is none yet",
        str(background.take_fault()),
    )
    assert not background.fault
    background.close()
    assert not caplog.text
    background = writer(tmp_path)
    background.write(snapshot(2))
    background.close()
    assert "checkpoint of step 2 could not be written" in caplog.text


def test_when_one_is_due(tmp_path, monkeypatch):
    """By steps always, also while one is being written; by the clock once that is written."""
    done, write = threading.Event(), CheckpointWriter._write
    monkeypatch.setattr(CheckpointWriter, "_write", lambda self, one: done.wait(60) and write(self, one))
    background = writer(tmp_path, every_steps=4, every_minutes=2, keep_every_epochs=2)
    background.write(snapshot(4))
    due = [step for step in (5, 8, 10, 11, 100) if background.due(step)]
    assert due == [8, 10, 100], "those kept for good, and the last, too"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert not background.due(13)
    done.set()
    background.wait(4)
    assert [background.due(step) for step in (14, 15)] == [True, True], "owed until it is written"
    background.write(snapshot(15))
    background.close()


def test_damaged_ones_are_set_aside_and_do_not_count(tmp_path):
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, snapshot(step))
    (tmp_path / "checkpoints/step_00000009/manifest.json").unlink()
    (tmp_path / "checkpoints/.step_00000010.tmp").mkdir()
    background = writer(tmp_path, sound=2)
    background.write(snapshot(3))
    background.wait(3)
    background.close()
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000009.damaged"]
