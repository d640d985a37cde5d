"""Every method, shrunk, over ranks that share one copy of the towers: the losses of one rank."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cosmos_ssl
from cosmos_ssl.config import Config, load_config

METHODS = {path.stem: path for path in sorted((Path(__file__).resolve().parents[2] / "configs/methods").glob("*.yaml"))}
DRAWN = {"continue_dinov2", "dino_txt", "dinov2", "lora_clip", "siglip2", "simdinov2"}
"""Whose towers or losses draw on the device, each rank its own numbers: held to ranks that have all."""
RUN = ["loader.workers=0", "evaluators=null", "logging={every_steps: 1, tensorboard: false}", "training.batch_size=8"]
RUN += ["training.precision=fp32", "training.device=cpu", "schedule.max_steps=2", "schedule.warmup_steps=1"]


def train(rank: int, world: int, store: str, runs: Mapping[str, tuple[str, list[str]]], results: Any) -> None:
    """Losses of each run: method and overrides."""
    torch.set_num_threads(1)
    os.environ.pop("WORLD_SIZE", None)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for name, (method, overrides) in runs.items():
        cosmos_ssl.make_trainer(METHODS[method], overrides).train()
        folder = next(text for text in overrides if text.startswith("output_dir=")).partition("=")[2]
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        results[name] = [{key: row[key] for key in row if key.startswith(("loss", "grad_norm"))} for row in rows]
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.slow
def test_the_losses_of_every_method_are_those_of_one_rank(
    small: Callable[[Config], list[str]], in_ranks: Callable[..., dict[Any, Any]], tmp_path: Path
) -> None:
    """``fsdp`` on two ranks, of four methods ``hsdp`` on two copies of two ranks each: one of these sets features apart
    by the logarithm of their distances, which is held to one rank where these are not as small as rounding.
    """

    def runs(kind: str, methods: set[str], *own: str) -> dict[str, tuple[str, list[str]]]:
        found = {}
        for name in sorted(methods):
            config = load_config(METHODS[name]).config
            schema = "null" if config.augmenters.text is None else "dreamlip"
            sizes = f"train_samples: 24, validation_samples: 8, image_size: 48, caption_schema: {schema}"
            data = f"data={{type: scenes, {sizes}, folder: '{tmp_path}/scenes'}}"
            folder = f"output_dir={tmp_path}/{kind}/{name}"
            new = [] if config.model.pretrained is None else ["model.pretrained=null"]  # weights that are not there
            found[f"{kind} {name}"] = name, [*RUN, data, *small(config), *new, folder, *own]
        return found

    expected: dict[str, Any] = {}
    apart = ("model.image.layer_scale=1.0", "model.image.drop_path=0.0", "losses.koleo.scope=all_ranks")
    train(0, 1, "", runs("one", METHODS.keys() - DRAWN), expected)
    train(0, 1, "", {"one apart": runs("apart", {"dinov2"}, *apart)["apart dinov2"]}, expected)
    shared = runs("fsdp", set(METHODS), "training.parallel=fsdp")
    found = in_ranks(train, 2, {**runs("one", DRAWN), **shared})
    copies = ("training.parallel=hsdp", "training.parallel_shards=2")
    four = runs("hsdp", {"cosmos", "silc", "lit"}, *copies)
    four["hsdp apart"] = runs("hsdp", {"dinov2"}, *copies, *apart)["hsdp dinov2"]
    found |= in_ranks(train, 4, four)
    expected |= {name: rows for name, rows in found.items() if name.startswith("one ")}
    assert len(found) == len(METHODS) + len(DRAWN) + 4
    for name, rows in found.items():
        for row, same in zip(rows, expected[f"one {name.partition(' ')[2]}"], strict=True):
            assert row == pytest.approx(same, rel=1e-5), name
