"""The recipes: they build as they are; shrunk to procedural scenes they train, and go on to the same numbers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cosmos_ssl_moco
import pytest

import cosmos_ssl

TEXT, PICTURES = cosmos_ssl_moco.RECIPE, cosmos_ssl_moco.PICTURES
SMALL = [
    "data={type: scenes, train_samples: 24, validation_samples: 8, image_size: 32}",
    "evaluators=null",
    "model={embed_dim: 32, image: {width: 64, layers: 1, image_size: 32, patch_size: 8}}",
    "augmenters.image.global_crops_size=32",
    *(f"heads.{name}={{hidden_dim: 24, output_dim: 16}}" for name in ("project", "predict")),
    *("training={batch_size: 8, precision: fp32, device: cpu}", "schedule={max_steps: 4, warmup_steps: 1}"),
    *("loader.workers=0", "logging={every_steps: 1, tensorboard: false}", "checkpoints.every_steps=2"),
]
OF = {
    TEXT: [
        *("model.text={width: 64, layers: 1, heads: 1}", "tokenizer.context_length=24"),
        *("losses.texts={text_queue: 20, image_queue: 20}", "data.caption_schema=dreamlip"),
    ],
    PICTURES: ["losses.moco.queue_size=20", "data.caption_schema=null"],
}


def train(recipe: str, folder: Path) -> list[dict[str, Any]]:
    """Train a small recipe in a folder; the rows of its metrics, without what the clock has a part in."""
    places = [f"data.folder={folder / 'scenes'}", f"output_dir={folder / 'run'}"]
    cosmos_ssl.train(recipe, [*SMALL, *OF[recipe], *places])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = ("samples_per_second", "data_wait")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows if "loss" in row]


@pytest.mark.parametrize("recipe", [TEXT, PICTURES], ids=["text", "pictures"])
def test_trains_and_goes_on_to_the_same_numbers(recipe: str, tmp_path: Path) -> None:
    """The queues of 20 take 16 keys a step (8 of texts): what step 3 finds in them, steps 1 and 2 have put there."""
    rows = train(recipe, tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and len({row["loss"] for row in rows}) == 4
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000004")
    (tmp_path / "run" / "result.json").unlink()
    assert [folder.name for folder in checkpoints.glob("step_*")] == ["step_00000002"]
    assert train(recipe, tmp_path) == rows


@pytest.mark.parametrize(("recipe", "words"), [(TEXT, []), (PICTURES, ["pictures"])], ids=["text", "pictures"])
def test_a_recipe_builds_as_it_is_and_its_command_holds(recipe: str, words: list[str]) -> None:
    def run(*command: str) -> str:
        program = shutil.which(command[0], path=str(Path(sys.executable).parent))
        done = subprocess.run([str(program), *command[1:]], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("python", "-m", "cosmos_ssl_moco", *words).strip() == recipe
    [line] = [line for line in Path(recipe).read_text().splitlines() if line.startswith("# Command:")]
    program, flag, place, *overrides = shlex.split(line.partition(":")[2])
    assert (program, flag) == ("cosmos-launch", "--config")
    assert place == f"$({' '.join(['python -m cosmos_ssl_moco', *words])})"
    assert "ok" in run("cosmos-ssl", "config", "check", recipe, *overrides)


def test_the_readme_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, on fewer samples and steps."""
    fewer = ["data={train_samples: 16, validation_samples: 8, folder: scenes}", "loader.workers=0"]
    fewer += ["training.batch_size=8", "schedule={max_steps: 2, warmup_steps: 1}"]
    real = cosmos_ssl.train
    monkeypatch.setattr(cosmos_ssl, "train", lambda recipe, overrides: real(recipe, [*overrides, *fewer]))
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(block, {})
    assert (tmp_path / "runs").is_dir()
