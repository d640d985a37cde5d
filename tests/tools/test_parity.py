"""The parity tool on the recorded values, on changed ones, and on a model of other sizes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos_ssl.interop.foreign import read_foreign
from cosmos_ssl.interop.official import to_official

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("parity", ROOT / "tools" / "parity.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["parity"]


@pytest.fixture
def run(tool, monkeypatch, capsys):
    """Exit code, lines and errors of the tool on a folder."""

    def run(folder):
        monkeypatch.setattr(sys, "argv", ["parity.py", str(folder)])
        code = tool.main()
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err

    return run


@pytest.fixture
def copy(tmp_path):
    """A copy of the recorded folder, with changes to values and meta."""

    def copy(change=lambda values: None, **meta):
        folder = tmp_path / "copy"
        shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
        values = load_file(folder / "golden.safetensors")
        change(values)
        save_file(values, folder / "golden.safetensors")
        old = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**old, **meta}))
        return folder

    return copy


def test_agrees_with_the_official_program(run):
    code, lines, _ = run(GOLDEN)
    failed = [line for line in lines if "FAIL" in line]
    assert (code, failed) == (0, [])
    names = {line.split()[0] for line in lines[:-1]}
    recorded = load_file(GOLDEN / "golden.safetensors")
    inputs = {name for name in recorded if name == "texts" or name.startswith("image.") or name.endswith(".image")}
    assert recorded.keys() - inputs - {"trajectory"} <= names
    assert {
        f"trajectory.{step}.{column}"
        for step in range(6)
        for column in ("clip_loss", "distill_loss", "grad_norm", "lr")
    } <= names


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("student.img_crossmodal_features", 2e-5),
        ("loss.distill", 2e-5),
        ("dense.48x32.tokens.csa1", 1e-4),
        ("final.loss.clip", 3e-4),
    ],
)
def test_a_changed_value_fails(run, copy, name, by):
    def change(values):
        values[name].view(-1)[0] += by

    code, lines, _ = run(copy(change))
    assert code == 1
    assert [line.split()[0] for line in lines if line.endswith("FAIL")] == [name]


def test_a_changed_step_fails(run, copy):
    def change(values):
        values["trajectory"][4, 1] *= 1 + 2e-4

    code, lines, _ = run(copy(change))
    assert (code, [line.split()[0] for line in lines if line.endswith("FAIL")]) == (1, ["trajectory.4.clip_loss"])


def test_another_momentum_shows(run, copy):
    code, lines, _ = run(copy(teacher_momentum=0.9))
    assert code == 1
    assert any(line.startswith("trajectory.1.distill_loss") and line.endswith("FAIL") for line in lines)
    assert all(line.endswith("ok") for line in lines if line.startswith("trajectory.0"))


def test_a_value_that_is_not_known_fails(run, copy):
    def change(values):
        values["student.other"] = torch.ones(2)

    code, lines, _ = run(copy(change))
    assert (code, next(line for line in lines if line.endswith("FAIL")).split()[0]) == (1, "student.other")


def test_what_compares_nothing_fails(run, tool, copy, monkeypatch):
    name = "student.image_features"

    def remove(values):
        for other in set(values) - {"texts"}:
            if not other.startswith("image."):
                del values[other]

    folder = copy(lambda values: values[name].zero_())
    monkeypatch.setattr(tool, "at_these_weights", lambda recording: {name: torch.zeros_like(recording.values[name])})
    monkeypatch.setattr(tool, "dense", lambda recording: {})
    assert any(line.startswith(f"{name} {tool.NOTHING}") and line.endswith("FAIL") for line in run(folder)[1])
    monkeypatch.setattr(tool, "at_these_weights", lambda recording: {})
    assert run(copy(remove))[::2] == (1, f"parity: {folder} has no recorded quantities, so nothing was compared\n")
    assert not tool.compare_tensors("empty", torch.zeros(0), torch.zeros(0), 1.0).ok


def test_folders_that_cannot_be_used(run, copy, tmp_path):
    code, _, err = run(tmp_path)
    assert code == 2
    assert "is no folder of recorded values" in err
    folder = copy(lambda values: values.pop("image.3"))
    assert run(folder)[::2] == (2, "parity: golden.safetensors lacks image.3\n")
    (folder / "golden.safetensors").write_bytes(b"")
    assert run(folder)[0] == 2


def test_other_sizes_and_a_nested_meta(run, tool, tmp_path):
    """Towers of other depths, other numbers of views and none local: our own values agree with themselves."""
    meta = json.loads((GOLDEN / "meta.json").read_text())
    model = {key: meta.pop(key) for key in ("embed_dim", "vision_cfg", "text_cfg")}
    model["text_cfg"]["layers"] = 1
    meta |= {"model": model, "batch": 3, "local_crops": 0, "captions": 2}
    student, teacher = (
        {
            n: v
            for n, v in to_official(read_foreign(GOLDEN / "official_checkpoint.pt", role).state).items()
            if not n.startswith("transformer.resblocks.1")
        }
        for role in ("student", "teacher")
    )
    torch.save({"student": student, "teacher": teacher}, tmp_path / "official_checkpoint.pt")
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    torch.manual_seed(0)
    values = {f"image.{i}": torch.randn(3, 3, 32, 32) for i in range(2)}
    values["texts"] = torch.randint(0, 255, (6, 16))
    values["dense.24x40.image"] = torch.randn(2, 3, 24, 40)
    values["trajectory"] = torch.zeros(2, 6, dtype=torch.float64)
    save_file(values, tmp_path / "golden.safetensors")
    recording = tool.Recording(tmp_path)
    values |= {
        name: value.contiguous() for name, value in (tool.at_these_weights(recording) | tool.dense(recording)).items()
    }
    rows, without = tool.train(recording)
    assert without == []
    values["trajectory"] = torch.tensor(
        [[row[column] for column in meta["trajectory_columns"]] for row in rows], dtype=torch.float64
    )
    save_file(values, tmp_path / "golden.safetensors")
    code, lines, _ = run(tmp_path)
    assert (code, [line for line in lines if "FAIL" in line]) == (0, [])
    assert values["teacher.image_features"].shape == (6, 32)
