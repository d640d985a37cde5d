"""``cosmos_ssl.testing``: all of our own augmenters, heads, losses and teachers pass its checks, and it finds what breaks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl import registry, testing

CHECKS = {
    "augmenters": testing.check_augmenter,
    "heads": testing.check_head,
    "losses": testing.check_loss,
    "teachers": testing.check_teacher,
    "towers": testing.check_tower,
}
OWN = [record for record in registry.records() if record.own]
PROTOTYPES: dict[str, Any] = {"hidden_dim": 24, "bottleneck_dim": 16, "output_dim": 40}
DINO: dict[str, Any] = {"heads": {"dino": {"type": "dino_projection", **PROTOTYPES}}}
# What a part must be given, or is too large without: options, or several sets of them.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "augmenters/multi_crop": [
        {"global_crops_size": 32, "local_crops_size": 16},
        {"global_crops_size": 32, "local_crops_number": 0, "mask_probability": 0.7, "solarize_probs": (0.5, 0.5, 0.5)},
    ],
    "augmenters/resize_crop": [{"size": 32}, {"size": 32, "flip": True}],
    "augmenters/view_groups": [{"groups": {"a": {"size": 32}, "b": {"size": 16, "number": 3, "flip_prob": 0.5, "color_jitter_prob": 1.0}}}],
    "heads/cross_attention": [{"num_heads": 4}, {"num_heads": 2, "mask_padding": True}],
    "heads/dino_projection": [PROTOTYPES, {**PROTOTYPES, "norm_last_layer": False, "batch_norm": True}],
    "heads/dinov2_projection": [PROTOTYPES],
    "heads/projection": [
        {"hidden_dim": 24, "output_dim": 16},
        {"input": "projected", "modality": "text", "hidden_dim": 24, "layers": 3, "batch_norm": False},
        {"input": "cross", "hidden_dim": 24, "output_batch_norm": True},
    ],
    "losses/cross_modality_distillation": [{}, {"head": "cross"}],
    "losses/dino": [{"head": "dino"}, {"head": "dino", "centering": "sinkhorn"}],
    "losses/ibot": [{"head": "dino"}],
    "losses/lightly": [
        {"loss": "NTXentLoss"},
        {"loss": "VICRegLoss", "head": "dino"},
        {"loss": "NegativeCosineSimilarity", "target": "teacher", "group": "local"},
    ],
    "teachers/ema": [{}, {"momentum_teacher": 0.5, "final_momentum_teacher": 0.9}],
    "teachers/frozen": [],  # needs a checkpoint: below
    "towers/clip_text": [{"width": 24, "heads": 2, "layers": 2}],
    "towers/clip_vit": [
        {"width": 24, "heads": 2, "layers": 2, "patch_size": 8, "image_size": 32, "registers": 2, "drop_path": 0.2},
        {"width": 24, "heads": 2, "layers": 1, "patch_size": 8, "image_size": 32, "mask_token": True, "layer_scale": 1e-2},
    ],
    "towers/huggingface": [{"architecture": "bert", "config": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}}],
    "towers/timm": [],  # its smallest models are too large for the pictures here
}
AROUND = {"losses/dino": DINO, "losses/ibot": DINO, "losses/lightly": DINO}


def cases() -> list[Any]:
    """Every own part of the kinds that can be checked, with each set of options."""
    found = []
    for record in OWN:
        name = f"{record.group}/{record.name}"
        if record.group in CHECKS:
            found += [pytest.param(record, options, id=f"{name}-{i}") for i, options in enumerate(OPTIONS.get(name, [{}]))]
    return found


@pytest.mark.parametrize(("record", "options"), cases())
def test_own_part(record: registry.Record, options: dict[str, Any]) -> None:
    CHECKS[record.group](record.qualified, around=AROUND.get(f"{record.group}/{record.name}"), **options)


@pytest.mark.parametrize("record", OWN, ids=lambda record: f"{record.group}/{record.name}")
def test_options_of_every_own_part_are_described(record: registry.Record) -> None:
    testing.check_options(record.group, record.qualified)


def test_frozen_teacher(tmp_path: Path) -> None:
    testing.small_run(tmp_path, steps=1)
    testing.check_teacher("frozen", checkpoint=str(tmp_path / "run"))
