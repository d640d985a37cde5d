"""The recipes: they build as they are, and shrunk to procedural scenes they train, go on, and split their batches."""

from __future__ import annotations

import json
import math
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from cosmos_ssl_masked import RECIPES

import cosmos_ssl
from cosmos_ssl.api import UserError
from cosmos_ssl.evaluation import knn

SMALL = [
    "data={type: scenes, train_samples: 24, validation_samples: 8, image_size: 32}",
    "evaluators=null",
    "model={embed_dim: 32, image: {width: 64, layers: 1, heads: 1, image_size: 32, patch_size: 8}}",
    "augmenters.image.size=32",
    *("training={batch_size: 8, precision: fp32, device: cpu}", "schedule={epochs: 1, warmup_steps: 1}"),
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
def test_trains_and_goes_on_to_the_same_numbers(method: str, tmp_path: Path) -> None:
    """Cut off after its second step; and with a batch that is encoded in parts."""
    losses = train(method, tmp_path, "checkpoints.every_steps=2")
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and len(set(losses)) == 3
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    (run / "result.json").unlink()
    assert train(method, tmp_path, "checkpoints.every_steps=2") == losses
    shutil.rmtree(run)
    assert train(method, tmp_path, "training.micro_batch_size=4") == pytest.approx(losses, rel=1e-5)
