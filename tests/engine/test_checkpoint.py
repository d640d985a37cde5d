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
from cosmos_ssl.engine import shares
from cosmos_ssl.engine.background import CheckpointWriter
from cosmos_ssl.engine.checkpoint import (
    Snapshot,
    begin_checkpoint,
    checkpoint_folders,
    find_fault,
    latest_checkpoint,
    load_exactly,
    load_tensors,
    read_state,
    save_checkpoint,
    to_files,
)
from cosmos_ssl.engine.layout import LARGE, PIECE, Split, files_of, roles_in
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


def in_files(step, split):
    tensors, files = to_files(snapshot(step).tensors, split)
    return replace(snapshot(step), tensors=tensors, files=files)


def test_several_files_a_role(tmp_path):
    """As Hugging Face's libraries name them; read as one, and what is not as the index tells is seen."""
    path = save_checkpoint(tmp_path, in_files(1, Split(3)))
    assert find_fault(path) is None and roles_in(path) == ["optimizer", "student"]
    names = [f"student-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [file.name for file in files_of(path, "student")] == names
    assert (path / "optimizer.safetensors").exists(), "a single tensor"
    where = json.loads((path / "student.safetensors.index.json").read_text())
    assert where["metadata"]["total_size"] == sum(x.nbytes for x in TENSORS.values())
    assert all(name in load_file(path / file) for name, file in where["weight_map"].items())
    found = load_tensors(path, "student")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    for change, told in (
        ({"a": "../x-00001-of-00003.safetensors"}, "is no file of the student"),
        ({"a": "optimizer-00001-of-00003.safetensors"}, "is no file of the student"),
        ({"a": names[2]}, "holds other tensors than student.safetensors.index.json tells"),
        ({"b": "student-00009-of-00003.safetensors"}, "student-00009-of-00003.safetensors is missing"),
    ):
        index = {**where, "weight_map": where["weight_map"] | change}
        (path / "student.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=told):
            load_tensors(path, "student")
        assert "student.safetensors.index.json has" in find_fault(path)


def test_who_writes_which_file():
    """Evenly over ranks and hosts; by themselves large roles lie in several files, and all that no host can hold."""
    sizes = {f"{n:02}": PIECE // 2 for n in range(20)}
    roles = {"student": sizes, "optimizer": {f"{key}.m": 2 * size for key, size in sizes.items()}, "count": {"n": 8}}
    one = Split(1, ranks=64).files(roles)
    assert [[file.rank for file in files] for files in one.values()] == [[0], [0], [0]]
    many = Split(4, ranks=3).files(roles)
    assert [[file.rank for file in files] for files in many.values()] == [[0, 0, 0, 1], [1, 1, 2, 2], [2]]
    for role, files in many.items():
        assert sorted(name for file in files for name in file.tensors) == sorted(roles[role])
        assert max(file.bytes for file in files) - min(file.bytes for file in files) <= 2 * PIECE // 2
    auto = {memory: Split("auto", ranks=64, memory=memory).files(roles) for memory in (1 << 60, 4 * LARGE)}
    assert [len(files) for files in auto[1 << 60].values()] == [10, 20, 1], "40 GiB and 80, and a number"
    assert [len(files) for files in auto[4 * LARGE].values()] == [10, 20, 1]


def test_a_rank_that_never_tells_of_its_files_leaves_the_one_before(tmp_path, monkeypatch):
    """The folder is begun, a file is there, and the rank is gone; one that tells of a fault ends it at once."""
    monkeypatch.setattr(shares, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(shares.Shares, "_store", lambda self: store)
    store = torch.distributed.HashStore()
    save_checkpoint(tmp_path, snapshot(1))
    telling = shares.Shares()
    for number, (fault, error, message) in enumerate(
        (
            (None, OSError, "rank 1 has not written its files"),
            (OSError(28, "No space left"), OSError, "rank 1: .*No space left"),
            (TrainingError("a of the student is not finite"), TrainingError, "^a of the student is not finite$"),
        )
    ):
        begin_checkpoint(tmp_path, 2)
        if fault is not None:
            telling.tell(1, number, files={}, fault=fault)
        else:
            telling.leave()
        with pytest.raises(error, match=message):
            save_checkpoint(tmp_path, in_files(2, Split(2, ranks=2)), lambda at=number: telling.hear([1], at))
        assert names(tmp_path) == ["step_00000001"] and latest_checkpoint(tmp_path).name == "step_00000001"


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
