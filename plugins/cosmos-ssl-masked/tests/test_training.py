"""The recipes: they build as they are, and shrunk to procedural scenes they learn, go on, and split their batches."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cosmos_ssl_masked import RECIPES

import cosmos_ssl

SMALL = [
    "data={type: scenes, train_samples: 24, validation_samples: 8, image_size: 32}",
    "evaluators=null",
    "model={embed_dim: 32, image: {width: 64, layers: 1, heads: 1, image_size: 32, patch_size: 8}}",
    "augmenters.image.size=32",
    *("training={batch_size: 8, precision: fp32, device: cpu}", "schedule={epochs: 8, warmup_steps: 1}"),
    "optimizer.lr=3e-3",
    *("loader.workers=0", "logging={every_steps: 1, tensorboard: false}"),
]
HEADS = {"ijepa": "predictor", "mae": "decoder"}


def train(method: str, folder: Path, *overrides: str) -> list[float]:
    """Train a small recipe in a folder; its losses, a step each."""
    head = f"heads.{HEADS[method]}={{width: 32, layers: 1, num_heads: 2}}"
    places = (f"data.folder={folder / 'scenes'}", f"output_dir={folder / 'run'}")
    cosmos_ssl.train(RECIPES[method], [*SMALL, head, *places, *overrides])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row[f"loss/{method}"] for row in rows if "loss" in row]


@pytest.mark.parametrize("method", RECIPES)
def test_learns_and_goes_on_to_the_same_numbers(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 steps, the last four once more after a cut, the first three with a batch that is encoded in parts."""
    losses = train(method, tmp_path, "checkpoints.every_steps=20")
    start, end = sum(losses[:6]), sum(losses[-6:])
    assert len(losses) == 24 and end < 0.75 * start
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "step_00000024")
    (run / "result.json").unlink()
    capsys.readouterr()
    assert train(method, tmp_path, "checkpoints.every_steps=20") == losses
    assert "at step 20 (sample 160" in capsys.readouterr().out
    shutil.rmtree(run)
    short = ["schedule.max_steps=3", "training.micro_batch_size=4"]
    assert train(method, tmp_path, *short) == pytest.approx(train(method, tmp_path / "whole", *short[:1]), rel=1e-5)


@pytest.mark.parametrize("method", RECIPES)
def test_the_recipe_builds_as_it_is_and_its_command_holds(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cosmos_ssl_masked", method])
    runpy.run_module("cosmos_ssl_masked", run_name="__main__")
    assert capsys.readouterr().out.strip() == RECIPES[method]
    [line] = [line for line in Path(RECIPES[method]).read_text().splitlines() if line.startswith("# Command:")]
    program, flag, place, *overrides = shlex.split(line.partition(":")[2])
    assert (program, flag, place) == ("cosmos-launch", "--config", f"$(python -m cosmos_ssl_masked {method})")
    check = [str(Path(sys.executable).parent / "cosmos-ssl"), "config", "check", RECIPES[method], *overrides]
    done = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "ok" in done.stdout, done.stdout + done.stderr
