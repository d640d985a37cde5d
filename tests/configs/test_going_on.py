"""Recipes that go on from trained weights: they begin with the source's features, and move what they say they move."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import cosmos_ssl
from cosmos_ssl.api import Callback, CallbackContext, Spec
from cosmos_ssl.config import Config, load_config
from cosmos_ssl.models.encoder import ModelEncoder

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
IDS = open_clip.get_tokenizer("ViT-B-32", context_length=24)(["a red heart", "two blue stars on white"])
# what rests up to the second step and the third, as fnmatch patterns; all else moves
RESTS: dict[str, tuple[list[str], list[str]]] = {
    "finetune_clip": ([], []),
    "cosmos_from_clip": ([], []),
    "lora_clip": (
        [
            "image.[!b]*",
            "text.[!b]*",
            "*.norm?.*",
            "*.mlp.*",
            "*.attn.proj.*",
            "*.base_layer.*",
            "losses.clip.logit_scale",
        ],
    )
    * 2,
    "continue_dinov2": (["image.model.*", "image.projection"], ["image.projection"]),
    "lit": (["image.model.*"],) * 2,
    "dino_txt": (["image.*"],) * 2,
}
LATER = {"continue_dinov2": ["callbacks.later.step=2"]}


class Recorder(Callback):
    """Notes what a run starts with: features, and a copy of all tensors."""

    features: ClassVar[dict[str, Tensor]] = {}
    state: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @torch.no_grad()
    def start(self, ctx: CallbackContext) -> None:
        self.state.clear()
        self.state.update({name: x.clone() for name, x in ctx.model.state_dict().items()})
        encoder = ModelEncoder(ctx.model, self.spec)
        self.features["pooled"] = encoder.image_features(PIXELS)
        self.features["image"] = encoder.encode_image(PIXELS)
        if self.spec.text is not None:
            self.features["text"] = encoder.encode_text(IDS)


def losses(run: Path) -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in found if "loss" in row]


@pytest.mark.parametrize("name", RESTS)
@torch.no_grad()
def test_goes_on(
    name: str, shrink: Callable[[Config], list[str]], small_clip: Path, small_timm: Path, tmp_path: Path
) -> None:
    """Starts where the source is, moves and leaves what it should, and resumes to the same bits."""
    tree = {"extends": str(METHODS / f"{name}.yaml"), "callbacks": {"recorder": {"type": Recorder}}}
    run = tmp_path / "run"
    overrides = [*shrink(load_config(tree).config), *LATER.get(name, []), f"output_dir={run}"]
    overrides += ["checkpoints={every_steps: 1, keep_last: 9}"]
    with torch.enable_grad():
        cosmos_ssl.train(tree, overrides)
    if load_config(tree).config.model.pretrained is None:
        model = timm.create_model(f"local-dir:{small_timm}", pretrained=True, num_classes=0).eval()
        theirs = {"pooled": model(PIXELS)}
    else:
        clip = open_clip.create_model_from_pretrained(f"local-dir:{small_clip}", return_transform=False).eval()
        theirs = {"image": clip.encode_image(PIXELS, normalize=True), "text": clip.encode_text(IDS, normalize=True)}
        torch.testing.assert_close(Recorder.state["losses.clip.logit_scale"], clip.logit_scale.detach())
    for kind, features in theirs.items():
        torch.testing.assert_close(Recorder.features[kind], features, atol=1e-5, rtol=0)
    start, checkpoints = dict(Recorder.state), sorted((run / "checkpoints").glob("step_*"))
    states = [load_file(folder / "student.safetensors") for folder in checkpoints]
    for state, resting in zip(states[1:], RESTS[name], strict=True):
        rests = {part for part, x in start.items() if torch.equal(x, state[part])}
        assert rests == {part for part in start for pattern in resting if fnmatch.fnmatchcase(part, pattern)}
    before = losses(run)
    shutil.rmtree(checkpoints[-1])
    (run / "result.json").unlink()
    with torch.enable_grad():
        cosmos_ssl.train(tree, overrides)
    again = load_file(checkpoints[-1] / "student.safetensors")
    assert losses(run) == before and all(torch.equal(x, again[part]) for part, x in states[-1].items())
