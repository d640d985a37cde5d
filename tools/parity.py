#!/usr/bin/env python3
"""Compare our parts with recorded values of the official program: python tools/parity.py DIR.

DIR holds ``meta.json`` (sizes, optimiser), ``official_checkpoint.pt`` (start weights) and ``golden.safetensors``
(inputs and outputs). The model is rebuilt through a config and trained by the engine's own step. It prints one line per
recorded quantity: name, largest absolute difference, limit, ok or FAIL. A quantity that is empty, or zero on both
sides, compares nothing and fails. The program exits with 1 if a line fails or there is none, with 2 if DIR cannot be
used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.api import DataError, GroupFeatures, ImageGroup, Progress, TextGroup, UserError, Views
from cosmos_ssl.build import Builder
from cosmos_ssl.config import LoadedConfig, load_config
from cosmos_ssl.engine.checkpoint import load_exactly, of_role
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.engine.step import Step
from cosmos_ssl.interop.files import read_torch_file
from cosmos_ssl.interop.official import ROLES, from_official, to_official
from cosmos_ssl.models.encoder import ModelEncoder

FEATURES = 1e-5  # unit vectors and scales; of features of any length, times the greatest of them
LOSSES = 1e-5
TRAJECTORY = 1e-4  # losses and gradient norm of a step that builds on others, times the recorded value
LR = 1e-6  # times the recorded value
AFTER = 1e-4  # features after the trajectory
GLOBAL_TEXTS = 2
NOTHING = "(empty or zero on both sides)"


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison."""

    name: str
    difference: float
    limit: float

    @property
    def ok(self) -> bool:
        """Within the limit; what is not a number is not."""
        return self.difference <= self.limit

    def __str__(self) -> str:
        return f"{self.name:<44} {self.difference:9.2e}  limit {self.limit:.2e}  {'ok' if self.ok else 'FAIL'}"


class Recording:
    """A folder of recorded values and the run rebuilt from it: student and teacher at the recorded weights."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.values: dict[str, Tensor] = load_file(folder / "golden.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(f"{folder} is no folder of recorded values: {error}") from error
        self.meta: dict[str, Any] = {**meta, **meta.get("model", {})}
        if self.meta.get("add_zero_attn"):
            raise DataError(f"{folder}: add_zero_attn is not part of the method")
        self.inputs: set[str] = set()
        self.views = self._views()
        path = folder / "official_checkpoint.pt"
        student, teacher = (from_official(read_torch_file(path), role, path) for role in ROLES)
        loaded = self._config(student.config)
        self.assembly = Builder(loaded).assemble("measure")
        self.state = RunState(self.assembly, loaded.config, torch.device("cpu"))
        load_exactly(self.assembly.model, student.state, "the recorded student")
        self.teacher = self.state.models["teacher"]
        load_exactly(self.teacher, of_role(teacher.state, "teacher"), "the recorded teacher")
        self.step = Step(self.assembly, self.state, loaded.config.training)

    def _config(self, official: Mapping[str, Any]) -> LoadedConfig:
        """The config that the recorded sizes and settings stand for."""
        meta, optimizer, model = self.meta, self.meta["optimizer"], official["model"]
        vision = meta["vision_cfg"]
        crops = {name: group.pixels.shape for name, group in self.views.image.items()}
        image = {"type": "multi_crop", "local_crops_number": 0}
        for name, shape in crops.items():
            image |= {f"{name}_crops_number": shape[0], f"{name}_crops_size": shape[-1]}
        tree = {
            **official,
            "model": {
                **model,
                "image": {**model["image"], "heads": vision["width"] // vision.get("head_width", 64)},
                "text": {**model["text"], "heads": meta["text_cfg"].get("heads", 8)},
            },
            "augmenters": {"image": image, "text": {"type": "text_crop", "num_sampled_captions": meta["captions"]}},
            "teacher": {**official["teacher"], "momentum_teacher": meta["teacher_momentum"]},
            "optimizer": {
                **{key: optimizer[key] for key in ("lr", "eps", "weight_decay")},
                **dict(zip(("beta1", "beta2"), optimizer["betas"], strict=True)),
            },
            "schedule": {"epochs": 1, "warmup_steps": optimizer["warmup_steps"]},
            "training": {"batch_size": meta["batch"], "precision": "fp32"},
        }
        return load_config(tree)

    def _views(self) -> Views:
        """The recorded batch, finished pictures and token ids, by view group."""
        wanted = self.meta["global_crops"], self.meta["local_crops"]
        pictures = [self.input(f"image.{number}") for number in range(sum(wanted))]
        ids = self.input("texts").long().unflatten(0, (-1, self.meta["batch"]))
        image = {"global": pictures[: wanted[0]], "local": pictures[wanted[0] :]}
        text = {"global": ids[:GLOBAL_TEXTS], "local": ids[GLOBAL_TEXTS:]}
        return Views(
            keys=[str(number) for number in range(self.meta["batch"])],
            image={
                n: ImageGroup(pixels=torch.stack(p), params=torch.empty(len(p), len(p[0]), 0))
                for n, p in image.items()
                if p
            },
            text={n: TextGroup(tokens=t, lengths=t.argmax(-1) + 1) for n, t in text.items() if len(t)},
        )

    def input(self, name: str) -> Tensor:
        """A recorded input. Raises DataError where it is missing."""
        if name not in self.values:
            raise DataError(f"golden.safetensors lacks {name}")
        self.inputs.add(name)
        return self.values[name]


# ---------------------------------------------------------------------------- what is computed


@torch.no_grad()
def at_these_weights(recording: Recording) -> dict[str, Tensor]:
    """Everything that is recorded of the batch at the present weights, by its recorded name."""
    forward, views = recording.step.gradients.forward, recording.views
    losses = recording.assembly.model.losses
    student, teacher = forward.student(views), forward.teacher(views)
    assert teacher is not None
    logs = forward.losses(views, student, teacher, Progress(step=0, total_steps=1)).logs
    return {
        "student.image_features": _stacked(student.image),
        "student.text_features": _stacked(student.text),
        "student.img_crossmodal_features": student.heads["cross"]["image"].flatten(0, 1),
        "student.txt_crossmodal_features": student.heads["cross"]["text"].flatten(0, 1),
        "student.logit_scale": losses["clip"].get_parameter("logit_scale").exp(),
        "student.distill_logit_scale": losses["distill"].get_parameter("logit_scale").exp(),
        "teacher.image_features": _stacked(teacher.image),
        "teacher.text_features": _stacked(teacher.text),
        "loss.clip": logs["loss/clip"],
        "loss.distill": logs["loss/distill"],
    }


def _stacked(groups: Mapping[str, GroupFeatures]) -> Tensor:
    """Unit features of all views, view-major: [V x B, D]."""
    return torch.cat([group.unit.flatten(0, 1) for group in groups.values()])


def dense(recording: Recording) -> dict[str, Tensor]:
    """The teacher's dense inference of every recorded picture, plain and with csa."""
    encoder = ModelEncoder(recording.teacher, recording.assembly.spec)
    found: dict[str, Tensor] = {}
    for name in [name for name in recording.values if name.startswith("dense.") and name.endswith(".image")]:
        size = name.removesuffix(".image")
        for csa in (0, 1):
            tokens, pooled = encoder.dense(recording.input(name), csa=bool(csa))
            found |= {f"{size}.tokens.csa{csa}": tokens, f"{size}.pooled.csa{csa}": pooled}
    return found


def train(recording: Recording) -> tuple[list[dict[str, float]], list[str]]:
    """The recorded steps on the one batch: what each logs, and the official names of parameters without gradient."""
    state, step, rows = recording.state, recording.step, []
    without: list[str] = []
    total = recording.meta["optimizer"]["total_steps"]
    recording.assembly.model.train()
    for number in range(len(recording.values["trajectory"])):
        progress = Progress(step=number, total_steps=total)
        update = step(recording.views, progress)
        logs = update.result.logs
        if number == 0:
            without = list(
                to_official({n: p for n, p in recording.assembly.model.named_parameters() if p.grad is None})
            )
        scales = {
            name: loss.get_parameter("logit_scale").detach() for name, loss in recording.assembly.model.losses.items()
        }
        row: dict[str, Tensor | float] = {
            "distill_loss": logs["loss/distill"],
            "clip_loss": logs["loss/clip"],
            "grad_norm": update.norm,
            "lr": state.optimizer.lr,
            "logit_scale_after": scales["clip"],
            "distill_logit_scale_after": scales["distill"],
        }
        rows.append({name: float(value) for name, value in row.items()})
    return rows, without


# ---------------------------------------------------------------------------- what is compared


def compare(recording: Recording) -> Iterator[Line]:
    """A line for every recorded quantity; one that nothing here computes fails."""
    compared = set[str]()
    for name, value in (at_these_weights(recording) | dense(recording)).items():
        if name in recording.values:
            compared.add(name)
            yield compare_tensors(name, value, recording.values[name], _limit(name, recording.values[name]))
    if "trajectory" in recording.values:
        compared.add("trajectory")
        yield from _trajectory(recording)
        found = {f"final.{name}": value for name, value in at_these_weights(recording).items()}
        for name in sorted(found.keys() & recording.values.keys()):
            compared.add(name)
            yield compare_tensors(name, found[name], recording.values[name], _limit(name, recording.values[name]))
    for name in sorted(recording.values.keys() - compared - recording.inputs):
        yield Line(f"{name} (not known here)", torch.nan, 0)


def _trajectory(recording: Recording) -> Iterator[Line]:
    rows, without = train(recording)
    for index, column in enumerate(recording.meta["trajectory_columns"]):
        if not (recording.values["trajectory"][:, index].any() or any(row[column] for row in rows)):
            yield Line(f"trajectory.{column} {NOTHING}", torch.nan, 0)  # a single step may have a learning rate of 0
    for number, (row, recorded) in enumerate(zip(rows, recording.values["trajectory"].tolist(), strict=True)):
        for column, value in zip(recording.meta["trajectory_columns"], recorded, strict=True):
            share = {"lr": LR, "distill_loss": TRAJECTORY, "clip_loss": TRAJECTORY, "grad_norm": TRAJECTORY}.get(column)
            limit = FEATURES if share is None else share * abs(value) + 1e-12
            yield Line(f"trajectory.{number}.{column}", abs(row[column] - value), limit)
    if "params_without_grad" in recording.meta:
        names = {name.removeprefix("module.") for name in recording.meta["params_without_grad"]}
        yield Line("params_without_grad", len(names ^ set(without)), 0)


def _limit(name: str, recorded: Tensor) -> float:
    greatest = float(recorded.abs().max()) if recorded.numel() else 0.0
    if name.startswith("final."):
        return TRAJECTORY * greatest if ".loss." in name else AFTER
    if name.startswith("dense."):
        return FEATURES * max(1.0, greatest)
    return LOSSES if name.startswith("loss.") else FEATURES


def compare_tensors(name: str, value: Tensor, recorded: Tensor, limit: float) -> Line:
    if recorded.shape != value.shape:
        return Line(f"{name} {list(value.shape)}, not {list(recorded.shape)}", torch.nan, limit)
    if not (value.any() or recorded.any()):
        return Line(f"{name} {NOTHING}", torch.nan, limit)
    return Line(name, (value.double() - recorded.double()).abs().max().item(), limit)


def main() -> int:
    """Print the lines; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder with meta.json, official_checkpoint.pt, golden.safetensors"
    )
    folder = parser.parse_args().folder
    count = failed = 0
    try:
        for line in compare(Recording(folder)):
            print(line)
            count, failed = count + 1, failed + (not line.ok)
    except UserError as error:
        print(f"parity: {error}", file=sys.stderr)
        return error.exit_code
    except KeyError as error:
        print(f"parity: {folder}/meta.json lacks {error}", file=sys.stderr)
        return UserError.exit_code
    print(f"{count - failed} of {count} recorded quantities agree" + (f", {failed} do not" if failed else ""))
    if not count:
        print(f"parity: {folder} has no recorded quantities, so nothing was compared", file=sys.stderr)
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
