"""The recipe: it builds as it is; shrunk to procedural scenes it learns to say captions, and resumes exactly."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cosmos_ssl_coca
import pytest

import cosmos_ssl

SMALL = [
    "data={type: scenes, train_samples: 48, validation_samples: 8, image_size: 32}",
    "model={embed_dim: 32, image: {width: 64, layers: 1, image_size: 32, patch_size: 8}, text: {width: 64, layers: 1, "
    "heads: 1}}",
    "heads.decoder={layers: 1, num_heads: 2, num_queries: 4}",
    "augmenters.image.size=32",
    "training={batch_size: 12, precision: fp32}",
    "optimizer.lr=1e-2",
    "schedule={max_steps: 8, warmup_steps: 1}",
    "checkpoints.every_steps=6",
    *("tokenizer.context_length=24", "evaluators=null", "loader.workers=0"),
    "logging={every_steps: 1, tensorboard: false}",
]


def train(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train the small recipe in a folder; the rows of its metrics, without what the clock has a part in."""
    folders = [f"data.folder={folder / 'scenes'}", f"output_dir={folder / 'run'}"]
    cosmos_ssl.train(cosmos_ssl_coca.RECIPE, [*SMALL, *folders, *overrides])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if key.startswith(("loss", "step"))} for row in rows if "loss" in row]


def test_trains_and_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    rows = train(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss/caption"] < 0.8 * rows[0]["loss/caption"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss/clip"] + 2 * row["loss/caption"], rel=1e-5)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    (tmp_path / "run" / "result.json").unlink()
    assert train(tmp_path) == rows


def test_micro_batches_are_exact(tmp_path: Path) -> None:
    first = train(tmp_path / "whole", "schedule.max_steps=2")
    second = train(tmp_path / "parts", "schedule.max_steps=2", "training.micro_batch_size=4")
    for row, other in zip(first, second, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_the_recipe_builds_as_it_is_and_its_command_holds() -> None:
    def run(*command: str) -> str:
        program = Path(sys.executable).parent / command[0]
        done = subprocess.run([str(program), *command[1:]], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    recipe = run("python", "-m", "cosmos_ssl_coca").strip()
    assert recipe == cosmos_ssl_coca.RECIPE
    [line] = [line for line in Path(recipe).read_text().splitlines() if line.startswith("# Command:")]
    program, flag, place, *overrides = shlex.split(line.partition(":")[2])
    assert (program, flag, place) == ("cosmos-launch", "--config", "$(python -m cosmos_ssl_coca)")
    assert "ok" in run("cosmos-ssl", "config", "check", recipe, *overrides)


def test_the_readme_s_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, on fewer samples."""
    fewer = [
        "data={train_samples: 64, validation_samples: 8, folder: scenes}",
        "schedule={max_steps: 2, warmup_steps: 1}",
        "loader.workers=0",
    ]
    real = cosmos_ssl.train
    monkeypatch.setattr(cosmos_ssl, "train", lambda recipe, overrides: real(recipe, [*overrides, *fewer]))
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(block, {})
    assert "loss/caption" in capsys.readouterr().out
