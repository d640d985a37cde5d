"""Every method and every ablation, shrunk, trains for a few steps on procedural scenes through the Python API."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cosmos_ssl
from cosmos_ssl.build import check
from cosmos_ssl.config import Config, load_config
from cosmos_ssl.config.sections import LossPart

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ABLATIONS = sorted((CONFIGS / "cosmos" / "ablations").glob("*.yaml"))
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
STEPS = 3  # as conftest.py has it
Shrink = Callable[[Config], list[str]]


def rows(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, without what the clock has a part in."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("samples_per_second", "data_wait", "gpu_wait", "memory", "mfu")
    return [{key: value for key, value in row.items() if key not in timed} for row in found if "loss" in row]


def weight(loss: LossPart, step: int) -> float:
    """Of a loss in a logged step: what moves does so for the last 20 %, one step of three."""
    moves = loss.loss_weight
    return moves if isinstance(moves, float) else moves.end if step == STEPS else moves.start


STILL = {
    "silc": "heads.dino.mlp.last_layer.*",  # in its first epoch
    "simdinov2": "image.projection",
    "lit": "image.model.*",
    "dino_txt": "image.*",
    "superclass": "image.projection",
    "dreamlip": "-",  # nothing
    "siglip2": "heads.distill.mlp.last_layer.weight_g",
    "tips": "heads.*.mlp.last_layer.*",
}
"""What the third step of a method does not move, and nothing else."""


def check_rows(config: Config, logged: list[dict[str, Any]], metrics: dict[str, float]) -> None:
    """All steps, all losses but those that rest, finite, and their weighted sum."""
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    assert {"loss", *(f"loss/{name}" for name in config.losses)} <= metrics.keys()
    assert all(math.isfinite(value) for row in logged for value in row.values() if isinstance(value, float))
    for row in logged:
        weights = {name: weight(part, row["step"]) for name, part in config.losses.items()}
        rests = {name for name, value in weights.items() if not value and row["step"] > 1}
        assert {name for name in weights if f"loss/{name}" not in row} == rests
        total = sum(value * row[f"loss/{name}"] for name, value in weights.items() if name not in rests)
        assert row["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "path",
    [path for path in (*METHODS, *ABLATIONS) if path.stem not in STILL],  # those are trained below
    ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")),
)
def test_trains(path: Path, shrink: Shrink, tmp_path: Path) -> None:
    config = load_config(path).config
    metrics = cosmos_ssl.train(path, [*shrink(config), f"output_dir={tmp_path}/run"])
    check_rows(config, rows(tmp_path / "run"), metrics)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert (checkpoint / "teacher.safetensors").exists() == (config.teacher.type != "none")


@pytest.mark.parametrize("name", STILL)
def test_resumes_to_the_same_numbers(
    name: str, shrink: Shrink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as SILC: contrast, self-distillation with a running centre, and a moving teacher; cut off after its second
    step.
    """
    path, run = CONFIGS / "methods" / f"{name}.yaml", tmp_path / "run"
    config = load_config(path).config
    overrides = [*shrink(config), f"output_dir={run}", "checkpoints.every_steps=2"]
    metrics = cosmos_ssl.train(path, overrides)
    before = rows(run)
    check_rows(config, before, metrics)
    last = run / "checkpoints" / f"step_{STEPS:08d}"
    ends = [load_file(folder / "student.safetensors") for folder in sorted(last.parent.glob("step_*"))]
    still = {part for part in ends[0] if torch.equal(ends[0][part], ends[1][part])}
    assert still == set(fnmatch.filter(ends[0], STILL[name]))
    assert (last / "teacher.safetensors").exists() == (config.teacher.type != "none")
    shutil.rmtree(last)
    (run / "result.json").unlink()
    assert [folder.name for folder in last.parent.iterdir()] == ["step_00000002"]
    capsys.readouterr()
    cosmos_ssl.train(path, overrides)
    assert "at step 2 (sample 16" in capsys.readouterr().out
    assert rows(run) == before and last.is_dir()


def test_methods_and_ablations_are_there() -> None:
    assert {path.stem for path in METHODS} == {
        *("clip", "siglip", "slip", "silc", "cosmos", "dino", "ibot", "dinov2"),
        *("simdinov2", "lit", "dino_txt"),
        *("superclass", "clipa"),
        *("dreamlip",),
        *("siglip2", "tips"),
        *("finetune_clip", "lora_clip", "cosmos_from_clip", "continue_dinov2"),
    }
    assert {path.stem for path in ABLATIONS} == {
        "no_cross_attention",
        "no_text_crop",
        "no_image_crop",
        "no_distillation",
    }


def test_image_only_methods_have_nothing_of_texts() -> None:
    for name in ("dino", "ibot", "dinov2"):
        config = load_config(CONFIGS / "methods" / f"{name}.yaml").config
        assert config.model.text is None and config.tokenizer is None and config.augmenters.text is None


def test_text_image_methods_differ_by_the_method_alone() -> None:
    cosmos = load_config(CONFIGS / "cosmos" / "vitb16_cc3m.yaml").config
    for name in ("clip", "siglip", "slip", "silc", "cosmos", "dreamlip"):
        own_decay = ["optimizer.weight_decay=0.5"] if name == "slip" else []
        config = load_config(CONFIGS / "methods" / f"{name}.yaml", own_decay).config
        for section in ("model", "tokenizer", "data", "optimizer", "schedule", "training", "evaluators", "loader"):
            assert getattr(config, section) == getattr(cosmos, section), (name, section)


def test_cosmos_as_a_method_is_the_published_recipe() -> None:
    assert (
        load_config(CONFIGS / "methods" / "cosmos.yaml").config
        == load_config(CONFIGS / "cosmos" / "vitb16_cc3m.yaml").config
    )


@pytest.mark.parametrize(
    ("name", "images", "texts", "heads", "losses"),
    [
        ("no_cross_attention", {"global": 2, "local": 6}, {"global": 2, "local": 6}, [], ["clip", "distill"]),
        ("no_text_crop", {"global": 2, "local": 6}, {"global": 2}, ["cross"], ["clip", "distill"]),
        ("no_image_crop", {"global": 2}, {"global": 2, "local": 6}, ["cross"], ["clip", "distill"]),
        ("no_distillation", {"global": 2}, {"global": 2, "local": 6}, [], ["clip"]),
    ],
)
def test_an_ablation_lacks_what_it_says(
    name: str, images: dict[str, int], texts: dict[str, int], heads: list[str], losses: list[str]
) -> None:
    assembly = check(load_config(CONFIGS / "cosmos" / "ablations" / f"{name}.yaml"))
    plan = assembly.plan.student
    assert {group: view.views for group, view in assembly.spec.image_views.items()} == images
    assert {group: view.views for group, view in assembly.spec.text_views.items()} == texts
    assert {group: len(planned.views) for group, planned in plan.image.items()} == images
    assert list(plan.heads) == heads and list(assembly.model.losses) == losses and not assembly.frozen
    assert (assembly.plan.teacher is None) == ("distill" not in losses)


PAIRS: dict[str, dict[str, Any]] = {
    "simsiam": {
        "heads": {
            "project": {
                "type": "projection",
                "layers": 3,
                "hidden_dim": 24,
                "output_dim": 16,
                "output_batch_norm": True,
            },
            "predict": {"type": "projection", "input": "project", "hidden_dim": 8, "output_dim": 16},
        },
        "losses": {
            "pairs": {
                "type": "lightly",
                "loss": "NegativeCosineSimilarity",
                "head": "predict",
                "target_head": "project",
            }
        },
    },
    "byol": {
        "heads": {
            "project": {"type": "projection", "hidden_dim": 24, "output_dim": 16},
            "predict": {"type": "projection", "input": "project", "hidden_dim": 24, "output_dim": 16},
        },
        "losses": {
            "pairs": {
                "type": "lightly",
                "loss": "NegativeCosineSimilarity",
                "head": "predict",
                "target": "teacher",
                "target_head": "project",
            }
        },
        "teacher": {"type": "ema", "momentum_teacher": 0.99, "final_momentum_teacher": 1.0},
    },
    "barlow_twins": {
        "heads": {"project": {"type": "projection", "layers": 3, "hidden_dim": 24, "output_dim": 16}},
        "losses": {
            "pairs": {
                "type": "lightly",
                "loss": "BarlowTwinsLoss",
                "options": {"lambda_param": 0.01},
                "head": "project",
            }
        },
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_view_pair_methods_of_lightly_train(name: str, shrink: Shrink, tmp_path: Path) -> None:
    """Methods without a recipe of their own, from the parts that there are: heads on heads, targets without
    gradient.
    """
    tree = {
        "extends": "base",
        "model": {"image": {"type": "clip_vit"}},
        "augmenters": {"image": {"type": "multi_crop", "local_crops_number": 0}},
        **PAIRS[name],
    }
    config = load_config({**tree, "data": {"type": "scenes"}}).config
    cosmos_ssl.train(tree, [*shrink(config), f"output_dir={tmp_path}/run"])
    losses = [row["loss/pairs"] for row in rows(tmp_path / "run")]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses) and len(set(losses)) == STEPS
    if name != "barlow_twins":
        assert all(-1 <= loss <= 1 for loss in losses)
