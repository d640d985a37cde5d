"""Every YAML of configs/ builds, and the recipes hold the published numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_ssl.build import check
from cosmos_ssl.config import Config, load_config
from cosmos_ssl.models.precision import resolve_precision

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
# The least that makes a run of base.yaml, which is none by itself.
SMALLEST = [
    "model.image={type: clip_vit}",
    "model.text={type: clip_text}",
    "tokenizer={type: clip}",
    "augmenters.image={type: resize_crop}",
    "augmenters.text={type: text_crop}",
    "losses.clip={type: clip}",
    "data={type: webdataset, train_data: train-0000.tar}",
]

# arXiv 2412.01814 and its authors' README: global batch, teacher momentum, captions, GPUs x batch, and R@1 on
# COCO (image to text, text to image) and Flickr30k, ImageNet top-1.
DATA = {
    "cc3m": (1024, 0.999, "dreamlip", "16 GPUs x 64", "2,823,019"),
    "cc12m": (4096, 0.99, "dreamlip", "128 GPUs x 32", "10,010,225"),
    "yfcc15m": (4096, 0.99, "dreamlip", "128 GPUs x 32", "14,065,827"),
    "merged30m": (4096, 0.99, "dreamlip", "128 GPUs x 32", "26,899,071"),
    "pixelprose": (4096, 0.99, "pixelprose", "128 GPUs x 32", "15,037,386"),
}
PUBLISHED = {
    "vitb16_cc3m": (53.1, 40.1, 84.1, 68.6, 37.1),
    "vitb16_cc12m": (64.2, 48.9, 91.4, 76.2, 51.4),
    "vitb16_yfcc15m": (67.5, 50.9, 92.6, 79.6, 52.4),
    "vitb16_merged30m": (68.0, 52.5, 92.9, 80.3, 57.6),
    "vitb16_pixelprose": (62.4, 43.4, 89.9, 73.6, 59.6),
    "vitb32_cc3m": (47.6, 33.5, 74.3, 59.2, 33.0),
    "vitb32_cc12m": (59.6, 43.0, 86.5, 69.8, 46.7),
    "vitb32_yfcc15m": (64.5, 46.0, 90.2, 73.3, 48.1),
    "vitb32_merged30m": (64.3, 48.4, 89.9, 76.1, 53.4),
    "vitb32_pixelprose": (57.2, 38.9, 85.6, 66.3, 54.3),
}


# OpenCLIP's model configs: embed_dim; of the image tower width, layers, heads and width of the MLP; of the text tower
# width, layers and heads.
UNTRIED = {
    "vitl14_merged30m": (768, (1024, 24, 16, 4096), (768, 12, 12)),
    "vitg14_merged30m": (1024, (1408, 40, 16, 6144), (1024, 24, 16)),
}


def recipe(name: str) -> Config:
    return load_config(CONFIGS / "cosmos" / f"{name}.yaml").config


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_builds(path: Path) -> None:
    assembly = check(load_config(path, SMALLEST if path == CONFIGS / "base.yaml" else []))
    assert assembly.model.towers and assembly.loss_weights


def test_the_ten_recipes_are_there() -> None:
    assert {path.stem for path in (CONFIGS / "cosmos").glob("*.yaml")} == PUBLISHED.keys() | UNTRIED.keys()


@pytest.mark.parametrize("name", UNTRIED)
def test_the_larger_recipes_have_the_towers_of_openclip_and_share_weights(name: str) -> None:
    config, model = recipe(name), check(load_config(CONFIGS / "cosmos" / f"{name}.yaml")).model
    embed, (width, layers, heads, hidden), text = UNTRIED[name]
    assert config.model.embed_dim == embed and config.training.parallel == "hsdp"
    blocks: dict[str, Any] = {tower: model.get_submodule(f"{tower}.blocks") for tower in ("image", "text")}
    shapes = {tuple(x.shape) for x in blocks["image"][0].parameters()}
    assert (len(blocks["image"]), blocks["image"][0].attn.heads) == (layers, heads) and (hidden, width) in shapes
    assert (len(blocks["text"]), blocks["text"][0].attn.heads) == text[1:]
    assert blocks["text"][0].norm1.weight.shape == text[:1]
    header = (CONFIGS / "cosmos" / f"{name}.yaml").read_text()
    assert "untried at scale" in header and f"cosmos-launch --config cosmos/{name}.yaml" in header


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_holds_the_published_numbers(name: str) -> None:
    config = recipe(name)
    batch, momentum, schema, _, _ = DATA[name.partition("_")[2]]
    assert config.name == f"cosmos_{name}"
    assert (
        config.training.batch_size == batch
        and resolve_precision(config.training.precision, torch.device("cuda")) == "amp_fp16"
    )
    assert config.teacher.type == "ema" and config.teacher.update_when == "before_optimizer_step"
    assert config.teacher.options == {"momentum_teacher": momentum}
    assert config.data.options["caption_schema"] == schema
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (
        5e-4,
        0.9,
        0.98,
        1e-8,
        0.5,
    )
    assert (config.schedule.epochs, config.schedule.warmup_steps, config.schedule.final_lr) == (32, 2000, 0.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_holds_the_published_model(name: str) -> None:
    assembly = check(load_config(CONFIGS / "cosmos" / f"{name}.yaml"))
    spec = assembly.spec
    assert spec.embed_dim == 512 and spec.context_length == 77 and spec.vocab_size == 49_408
    assert spec.image is not None and spec.text is not None
    assert (spec.image.width, spec.image.patch_size, spec.image.image_size) == (768, int(name[4:6]), 224)
    assert spec.text.width == 512
    assert {group: (view.views, view.size) for group, view in spec.image_views.items()} == {
        "global": (2, 224),
        "local": (6, 96),
    }
    assert {group: view.views for group, view in spec.text_views.items()} == {"global": 2, "local": 6}
    # OpenCLIP's ViT-B-16 has 149,620,737 parameters; B-32 has larger patches in the convolution and fewer positions.
    # COSMOS adds two attention heads with two norms each, a map to D for the tokens of each tower, and a log-scale.
    clip = 149_620_737 + (0 if name.startswith("vitb16") else (32**2 - 16**2) * 3 * 768 - (14**2 - 7**2) * 768)
    attention = 4 * (512 * 512 + 512) + 2 * 2 * 512
    maps = 768 * 512 + 512 + 512 * 512 + 512
    assert sum(parameter.numel() for parameter in assembly.model.parameters()) == clip + 2 * attention + maps + 1
    assert not assembly.frozen


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_states_command_hardware_and_result(name: str) -> None:
    header = "".join(line for line in (CONFIGS / "cosmos" / f"{name}.yaml").open() if line.startswith("#"))
    batch, _, _, hardware, samples = DATA[name.partition("_")[2]]
    assert f"cosmos-launch --config cosmos/{name}.yaml" in header
    assert f"{hardware} (global batch {batch:,})" in header
    published = re.search(r"Published: (.*)", header)
    assert published is not None and tuple(float(x) for x in re.findall(r"\d+\.\d", published[1])) == PUBLISHED[name]
    assert samples in (CONFIGS / "cosmos" / "shared" / f"{name.partition('_')[2]}.yaml").read_text()


def test_baseline_differs_from_cosmos_by_the_method_alone() -> None:
    clip, cosmos = load_config(CONFIGS / "methods" / "clip.yaml").config, recipe("vitb16_cc3m")
    for section in ("model", "tokenizer", "data", "optimizer", "schedule", "training", "evaluators", "loader"):
        assert getattr(clip, section) == getattr(cosmos, section), section
    assert clip.teacher.type == "none" and not clip.heads and list(clip.losses) == ["clip"]
