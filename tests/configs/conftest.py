"""Recipes made small, and small models as OpenCLIP and timm write them, for recipes that go on from such."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from cosmos_ssl.config import Config

Shrink = Callable[[Config], list[str]]
STEPS = 3
RUN = ["loader.workers=0", "evaluators=null", "logging={every_steps: 1, tensorboard: false}"]
RUN += [
    "training.batch_size=8",
    "training.precision=fp32",
    "training.device=cpu",
    f"schedule.max_steps={STEPS}",
    "schedule.warmup_steps=1",
]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scenes lie that all runs here read."""
    return tmp_path_factory.mktemp("scenes")


def _moved(model: torch.nn.Module) -> torch.nn.Module:
    """A model none of whose parameters is at its start value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model.eval()


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an OpenCLIP model of the sizes of ``small``."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"width": 64, "layers": 1}
    cfg = {
        "embed_dim": 32,
        "vision_cfg": {**sizes, "image_size": 32, "patch_size": 8},
        "text_cfg": {**sizes, "heads": 1, "context_length": 24, "vocab_size": 49408},
    }
    model = _moved(open_clip.model.CLIP(**cfg))
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    return folder


@pytest.fixture(scope="session")
def small_timm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT of timm's: registers and layer scale, as DINOv2 has them."""
    folder = tmp_path_factory.mktemp("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    kind = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    model = _moved(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes, **kind))
    timm.models.save_for_hf(model, folder, model_args={**sizes, **kind})
    return folder


@pytest.fixture
def shrink(small: Shrink, scenes: Path, small_clip: Path, small_timm: Path) -> Shrink:
    """Overrides that make a run of a config small; pictures without captions where it reads no text, and the small
    models where it starts from published weights.
    """

    def overrides(config: Config) -> list[str]:
        schema = "null" if config.augmenters.text is None else "dreamlip"
        sizes = "train_samples: 24, validation_samples: 8, image_size: 48"
        data = f"data={{type: scenes, {sizes}, caption_schema: {schema}, folder: '{scenes}'}}"
        start = [] if config.model.pretrained is None else [f"model.pretrained.from={small_clip}"]
        if config.model.image is not None and config.model.image.options.get("pretrained"):
            start += [f"model.image.model=local-dir:{small_timm}", "model.image.pretrained=true"]
        return [*RUN, data, *small(config), *start]

    return overrides
