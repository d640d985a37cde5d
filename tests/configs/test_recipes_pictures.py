"""Recipes of methods on pictures alone: the published numbers, headers, and what a step computes for student and
teacher.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cosmos_ssl.api import GroupPlan, ViewSpec
from cosmos_ssl.build import check
from cosmos_ssl.config import Config, load_config
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.optim import settings
from cosmos_ssl.models.precision import resolve_precision

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
# The authors' READMEs: top-1 on ImageNet by k-NN and by a linear classifier (iBOT also fine-tuned), GPUs x batch.
PUBLISHED = {
    "dino": ((69.3, 74.0), "8 GPUs x 64", 512),
    "ibot": ((75.2, 77.9, 82.3), "16 GPUs x 64", 1024),
    "dinov2": ((82.0, 84.5), "96 GPUs x 32", 3072),
    "simdinov2": ((78.1, 79.7), "8 GPUs x 128", 1024),
}
PICTURES, PICTURES_22K = 1_281_167, 14_197_086


def recipe(name: str) -> Config:
    return load_config(METHODS / f"{name}.yaml").config


def assembled(name: str) -> Assembly:
    return check(load_config(METHODS / f"{name}.yaml"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_states_command_hardware_and_result(name: str) -> None:
    header = "".join(line for line in (METHODS / f"{name}.yaml").open() if line.startswith("#"))
    results, hardware, batch = PUBLISHED[name]
    assert f"cosmos-launch --config methods/{name}.yaml data.train_data=" in header
    assert f"{hardware} (global batch {batch:,})" in header and recipe(name).training.batch_size == batch
    published = re.search(r"Published: (.*)", header)
    assert published is not None and tuple(float(x) for x in re.findall(r"\d+\.\d", published[1])) == results


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_all_share(name: str) -> None:
    config = recipe(name)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, config.schedule.final_lr) == (
        0.9,
        0.999,
        0.04,
        1e-6,
    )
    assert (
        config.training.clip_grad_norm == 3.0
        and resolve_precision(config.training.precision, torch.device("cuda")) == "amp_fp16"
    )
    assert config.teacher.type == "ema" and config.teacher.update_when == "after_optimizer_step"
    assert config.teacher.options["final_momentum_teacher"] == 1.0
    assert all(loss.options.get("student_temp", 0.1) == 0.1 for loss in config.losses.values())
    assert config.data is not None and config.data.type == "image_folder" and list(config.evaluators) == ["knn"]


def test_dino() -> None:
    """main_dino.py's defaults and arXiv 2104.14294, appendix: lr 5e-4 a batch of 256, 10 epochs of warm-up."""
    config, assembly = recipe("dino"), assembled("dino")
    assert config.optimizer.lr == 5e-4 * 512 / 256 and config.optimizer.weight_decay_end == 0.4
    assert config.schedule.epochs == 100 and config.schedule.warmup_steps == 10 * (PICTURES // 512)
    assert config.teacher.options["momentum_teacher"] == 0.996
    assert assembly.spec.image_views == {"global": ViewSpec(views=2, size=224), "local": ViewSpec(views=8, size=96)}
    assert config.augmenters.image is not None and config.augmenters.image.options["global_crops_scale"] == [0.4, 1.0]
    # a ViT-S/16 of 12 blocks (21,665,664 parameters in timm, with the patches' bias), and what nobody reads: the
    # projection
    tower = assembly.model.towers["image"]
    assert sum(p.numel() for p in tower.parameters()) == 21_665_664 - 384 + 384**2
    assert assembly.frozen == ["image.projection"]
    rules = settings(assembly.model, config.optimizer)
    assert rules["heads.dino.mlp.last_layer.weight_v"].frozen_epochs == 1


def test_ibot() -> None:
    """The command of the authors' README for ViT-S/16, over main_ibot.py's defaults."""
    config, assembly = recipe("ibot"), assembled("ibot")
    assert config.optimizer.lr == 5e-4 * 1024 / 256 and config.optimizer.weight_decay_end == 0.4
    assert config.schedule.epochs == 800 and config.schedule.warmup_steps == 10 * (PICTURES // 1024)
    assert assembly.spec.image_views == {
        "global": ViewSpec(views=2, size=224, masks=True),
        "local": ViewSpec(views=10, size=96),
    }
    assert assembly.spec.heads["dino"] == {
        "global": 8192,
        "local": 8192,
        "global_masked": 8192,
    }  # one head for images and patches
    for name in ("dino", "ibot"):
        options = config.losses[name].options
        assert [options[key] for key in ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs")] == [
            0.04,
            0.07,
            30,
        ]
    assert config.losses["dino"].loss_weight == config.losses["ibot"].loss_weight == 1


def test_dinov2() -> None:
    """train/vitl14.yaml over ssl_default_config.yaml, with its 500 epochs of 1,250 steps in epochs of the data set."""
    config, assembly = recipe("dinov2"), assembled("dinov2")
    steps = PICTURES_22K // 3072
    assert (
        config.optimizer.lr == pytest.approx(2e-4 * (3072 / 1024) ** 0.5, rel=1e-5)
        and config.optimizer.weight_decay_end == 0.2
    )
    assert (
        config.schedule.max_steps == 500 * 1250 <= config.schedule.epochs * steps
        and config.schedule.warmup_steps == 80 * 1250
    )
    assert config.teacher.options["momentum_teacher"] == 0.994
    assert {name: loss.loss_weight for name, loss in config.losses.items()} == {"dino": 1.0, "ibot": 1.0, "koleo": 0.1}
    for name in ("dino", "ibot"):
        options = config.losses[name].options
        assert (options["centering"], options["head"]) == ("sinkhorn", name)
        assert options["warmup_teacher_temp_epochs"] * steps == pytest.approx(30 * 1250, rel=1e-3)
        assert config.heads[name].options["freeze_last_layer"] * steps == pytest.approx(1250, rel=1e-3)
    assert assembly.spec.image_views == {
        "global": ViewSpec(views=2, size=224, masks=True),
        "local": ViewSpec(views=8, size=98),
    }
    rules = settings(assembly.model, config.optimizer)
    assert rules["image.patch_embed.weight"].lr_scale == 0.2 and rules["image.norm.weight"].lr_scale == 1


def test_simdinov2() -> None:
    """ssl_default_config.yaml of the authors' program: no prototypes, no KoLeo, a head of 256 for views and patches."""
    config, assembly = recipe("simdinov2"), assembled("simdinov2")
    assert (config.optimizer.lr, config.optimizer.weight_decay_end, config.optimizer.layer_decay) == (4e-3, 0.4, 0.9)
    assert config.schedule.epochs == 100 and config.schedule.warmup_steps == 10 * (PICTURES // 1024)
    assert config.teacher.options["momentum_teacher"] == 0.992
    (loss,) = config.losses.values()
    assert loss.options["eps"] ** 2 == pytest.approx(0.05, rel=1e-3)
    assert loss.options["gamma"] == pytest.approx(1 / 256 + 1 / 1024, rel=1e-3)
    assert assembly.spec.heads == {"project": dict.fromkeys(("global", "local", "global_masked"), 256)}
    assert assembly.frozen == ["image.projection"]
    rules = settings(assembly.model, config.optimizer)
    assert rules["image.patch_embed.weight"].lr_scale == pytest.approx(0.2 * 0.9**13)


def test_the_plan_of_masked_image_modelling() -> None:
    """The student sees hidden patches and local views, the teacher whole global views alone; nobody projects."""
    plan = assembled("dinov2").plan
    assert plan.teacher is not None
    assert plan.student.image == {
        "global": GroupPlan(views=(0, 1), projected=False, hide_masked=True, masked_tokens=True),
        "local": GroupPlan(views=tuple(range(8)), projected=False),
    }
    assert plan.teacher.image == {"global": GroupPlan(views=(0, 1), projected=False, masked_tokens=True)}
    assert plan.student.heads == {"dino": ("global", "local"), "ibot": ("global_masked",)}
    assert plan.teacher.heads == {"dino": ("global",), "ibot": ("global_masked",)}
    assert not plan.student.text and not plan.teacher.text
