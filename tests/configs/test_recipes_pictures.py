"""Recipes of methods on images alone: published results, sizes of towers, parameter rules, and what a step computes.

What their settings are in the sources is the table of the sources' business, not this file's.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from cosmos_ssl.api import GroupPlan, ViewSpec
from cosmos_ssl.build import check
from cosmos_ssl.config import Config, load_config
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.optim import Setting, settings
from cosmos_ssl.models.precision import resolve_precision

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
# The authors' READMEs: top-1 on ImageNet by k-NN and by a linear classifier (iBOT also fine-tuned), GPUs x batch.
PUBLISHED = {
    "dino": ((69.3, 74.0), "8 GPUs x 64", 512),
    "ibot": ((75.2, 77.9, 82.3), "16 GPUs x 64", 1024),
    "dinov2": ((82.0, 84.5), "96 GPUs x 32", 3072),
    "simdinov2": ((78.1, 79.7), "8 GPUs x 128", 1024),
}
LAYERS = 12 + 1
"""Of a ViT-S or ViT-B, the embedding's included: so often layer decay shrinks what the embedding learns."""


def recipe(name: str) -> Config:
    return load_config(METHODS / f"{name}.yaml").config


def assembled(name: str, *overrides: str) -> Assembly:
    return check(load_config(METHODS / f"{name}.yaml", overrides))


def header(name: str) -> list[str]:
    return [line for line in (METHODS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]


def rules(name: str, *overrides: str) -> dict[str, Setting]:
    """What applies to each parameter, by name."""
    loaded = load_config(METHODS / f"{name}.yaml", overrides)
    return settings(check(loaded).model, loaded.config.optimizer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_states_command_hardware_and_result(name: str) -> None:
    text = "\n".join(header(name))
    results, hardware, batch = PUBLISHED[name]
    assert f"cosmos-launch --config methods/{name}.yaml data.train_data=" in text
    assert f"{hardware} (global batch {batch:,})" in text and recipe(name).training.batch_size == batch
    published = re.search(r"Published: (.*)", text)
    assert published is not None and tuple(float(x) for x in re.findall(r"\d+\.\d", published[1])) == results


@pytest.mark.parametrize("name", PUBLISHED)
def test_precision_and_evaluation(name: str) -> None:
    config = recipe(name)
    assert resolve_precision(config.training.precision, torch.device("cuda")) == "amp_fp16"
    assert config.data is not None and config.data.type == "image_folder" and list(config.evaluators) == ["knn"]


def test_dino() -> None:
    """A ViT-S/16 of timm's size (21,665,664 parameters), with a projection that nothing reads."""
    assembly = assembled("dino")
    assert assembly.spec.image_views == {"global": ViewSpec(views=2, size=224), "local": ViewSpec(views=8, size=96)}
    tower = assembly.model.towers["image"]
    assert sum(p.numel() for p in tower.parameters()) == 21_665_664 + 384**2
    assert assembly.frozen == ["image.projection"]


def test_ibot() -> None:
    """One head for images and patches."""
    assembly = assembled("ibot")
    assert assembly.spec.image_views == {
        "global": ViewSpec(views=2, size=224, masks=True),
        "local": ViewSpec(views=10, size=96),
    }
    assert assembly.spec.heads == {"dino": dict.fromkeys(("global", "local", "global_masked", "global_patches"), 8192)}


def test_dinov2() -> None:
    """Views, and a drop path of one rate for all blocks."""
    assembly = assembled("dinov2")
    assert assembly.spec.image_views == {
        "global": ViewSpec(views=2, size=224, masks=True),
        "local": ViewSpec(views=8, size=98),
    }
    assert set(assembly.spec.heads) == {"dino", "ibot"} and assembly.frozen == ["image.projection"]


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2", "simdinov2"])
def test_class_and_mask_token_are_decayed(name: str) -> None:
    """Of the tower's parameters with one dimension these alone, as biases and norms are not."""
    found = rules(name)
    tokens = {"image.class_token"} | ({"image.mask_token"} if name != "dino" else set())
    assert {parameter for parameter, setting in found.items() if setting.decay_1d} == tokens


def test_last_layers_rest_at_first() -> None:
    """For an epoch, and in DINOv2 for 1,250 steps, however long an epoch of its images is."""
    for name in ("dino", "ibot"):
        assert rules(name)["heads.dino.mlp.last_layer.weight_v"].frozen_epochs == 1
    assembly = assembled("dinov2")
    (rule,) = assembly.callbacks["last_layers"].parameter_rules()
    layers = {name for name, _ in assembly.model.named_parameters() if ".last_layer." in name}
    assert {name.split(".")[1] for name in layers} == {"dino", "ibot"} and rule.match == "heads.*.mlp.last_layer.*"
    assert all(setting.frozen_epochs == 0 for setting in rules("dinov2").values())


@pytest.mark.parametrize(("name", "decay"), [("dinov2", 1.0), ("simdinov2", 0.9)])
def test_the_patch_embedding_learns_at_a_fifth(name: str, decay: float) -> None:
    found = rules(name)
    embedding = {parameter for parameter in found if parameter.startswith("image.patch_embed.")}
    assert embedding == {"image.patch_embed.weight", "image.patch_embed.bias"}
    for parameter in embedding:
        assert found[parameter].lr_scale == pytest.approx(0.2 * decay**LAYERS)
    assert found["image.class_token"].lr_scale == found["image.mask_token"].lr_scale == pytest.approx(decay**LAYERS)
    assert found["image.norm.weight"].lr_scale == 1


def test_continued_dinov2_learns_layer_by_layer() -> None:
    """The tower from 1e-5 downwards, its patch embedding at a fifth of the embedding's rate; what is new at 1e-4."""
    config, found = recipe("continue_dinov2"), rules("continue_dinov2")
    rate = {name: config.optimizer.lr * setting.lr_scale for name, setting in found.items()}
    embedding = 1e-5 * 0.9**LAYERS
    for name in ("cls_token", "reg_token", "pos_embed"):
        assert rate[f"image.model.{name}"] == pytest.approx(embedding)
    for name in ("weight", "bias"):
        assert rate[f"image.model.patch_embed.proj.{name}"] == pytest.approx(0.2 * embedding)
    assert rate["image.model.blocks.0.attn.qkv.weight"] == pytest.approx(1e-5 * 0.9 ** (LAYERS - 1))
    assert rate["image.mask_token"] == pytest.approx(10 * embedding) and found["image.mask_token"].decay_1d
    heads = {name: value for name, value in rate.items() if name.startswith("heads.")}
    assert heads and all(value == pytest.approx(1e-4) for value in heads.values())
    # heads alone are trained at first, their last layers included
    assert set(assembled("continue_dinov2").callbacks) == {"later"}
    assert all(found[name].frozen_epochs == 0 for name in heads)


def test_simdinov2() -> None:
    """No prototypes: one head of 256 features for views and patches, and registers in the tower."""
    assembly = assembled("simdinov2")
    assert assembly.spec.heads == {"project": dict.fromkeys(("global", "local", "global_masked"), 256)}
    assert assembly.frozen == ["image.projection"] and list(assembly.loss_weights) == ["simdino"]
    assert dict(assembly.model.named_parameters())["image.register_tokens"].shape == (4, 768)


def test_simdino_by_the_command_of_the_header() -> None:
    """SimDINO has no masks, registers, layer scales or layer decay, and another weight for its batch."""
    *_, command = [line.partition(":")[2] for line in header("simdinov2") if line.startswith("# Command:")]
    overrides = shlex.split(command)[3:]
    config = load_config(METHODS / "simdinov2.yaml", overrides).config
    assert (config.training.batch_size, config.optimizer.lr, config.optimizer.layer_decay) == (512, 1e-3, None)
    assert config.schedule.warmup_steps == 10 * (1_281_167 // 512)
    assert config.losses["simdino"].options["gamma"] == pytest.approx(1 / 256 + 1 / 512, rel=1e-3)
    assembly, found = assembled("simdinov2", *overrides), rules("simdinov2", *overrides)
    assert not any(view.masks for view in assembly.spec.image_views.values())
    absent = ("register_tokens", "mask_token", "scale")
    assert not [name for name in found if name.startswith("image.") and name.endswith(absent)]
    assert {setting.lr_scale for setting in found.values()} == {1.0}
    assert [name for name, setting in found.items() if setting.decay_1d] == ["image.class_token"]


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
