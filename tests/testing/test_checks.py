"""``cosmos_ssl.testing``: all of our own augmenters, heads, losses and teachers pass its checks, and it finds what
breaks them.
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from cosmos_ssl import registry, testing
from cosmos_ssl.api import (
    Augmenter,
    Callback,
    CallbackContext,
    CropGroup,
    Features,
    GroupFeatures,
    GroupPlan,
    Head,
    HeadOutput,
    ImageCrops,
    ImageGroup,
    Loss,
    LossOutput,
    Modality,
    Need,
    Optimizer,
    ParameterRule,
    Progress,
    Sample,
    Schedule,
    Spec,
    StepContext,
    Teacher,
    Views,
    ViewSpec,
)
from cosmos_ssl_plugins.augmenters.multi_crop import MultiCrop
from cosmos_ssl_plugins.towers.clip_vit import ClipViT

CHECKS = {
    "augmenters": testing.check_augmenter,
    "heads": testing.check_head,
    "losses": testing.check_loss,
    "optimizers": testing.check_optimizer,
    "schedules": testing.check_schedule,
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
    "augmenters/text_groups": [
        {"groups": {"a": {"caption_fields": ["raw_caption"]}, "b": {"number": 2, "max_sentences": 3}}}
    ],
    "augmenters/view_groups": [
        {"groups": {"a": {"size": 32, "mask_probability": 1.0}, "b": {"size": 16, "number": 3, "flip_prob": 0.5}}},
        {"groups": {"b": {"size": 16, "number": 3, "flip_prob": 0.5, "color_jitter_prob": 1.0}}},
    ],
    "heads/caption_decoder": [
        {"layers": 2, "width": 16, "num_heads": 2},
        {"layers": 1, "group": "local", "parallel": 0.5},
    ],
    "heads/class_and_patches": [{"heads": 2}, {"heads": 2, "layers": 1, "layer_scale": None, "drop_path": 0.5}],
    "heads/cross_attention": [{"num_heads": 4}, {"num_heads": 2, "mask_padding": True}],
    "heads/dino_projection": [PROTOTYPES, {**PROTOTYPES, "norm_last_layer": False, "batch_norm": True}],
    "heads/dinov2_projection": [PROTOTYPES],
    "heads/projection": [
        {"hidden_dim": 24, "output_dim": 16},
        {"input": "projected", "modality": "text", "hidden_dim": 24, "layers": 3, "batch_norm": False},
        {"input": "cross", "hidden_dim": 24, "output_batch_norm": True},
    ],
    "losses/captioning": [{"head": "captions"}],
    "losses/clip": [{}, {"head": "both"}, {"head": "second", "text_group": "local"}],
    "losses/coding_rate": [{}, {"head": "dino", "gamma": 0.1}],
    "losses/cross_modality_distillation": [{}, {"head": "cross"}],
    "losses/dino": [{"head": "dino", "student_groups": ["local"]}, {"head": "dino", "centering": "sinkhorn"}],
    "losses/ibot": [{"head": "dino"}, {"head": "dino", "center_over": "all"}],
    "losses/lightly": [
        {"loss": "NTXentLoss"},
        {"loss": "VICRegLoss", "head": "dino"},
        {"loss": "NegativeCosineSimilarity", "target": "teacher", "group": "local"},
    ],
    "losses/subcaption_grouping": [{}, {"negatives": "batch"}],
    "optimizers/timm": [{"name": "lion"}, {"name": "lamb", "options": {"betas": [0.9, 0.99]}}],
    "optimizers/torch": [{"name": "NAdam"}],
    "schedules/cosine": [{}, {"over_epochs": 2.5}],
    "schedules/linear": [{}, {"over_steps": 4}],
    "schedules/step": [{"at": [2, 5]}],
    "schedules/warmup_stable_decay": [{}, {"decay_steps": 3, "decay": "linear"}, {"decay": "at_once"}],
    "teachers/ema": [
        {"momentum_teacher": 0.5, "final_momentum_teacher": 0.9},
        {"momentum_teacher": {"type": "linear", "start": 0.5, "end": 0.9, "over_epochs": 1}},
    ],
    "teachers/frozen": [],  # needs a checkpoint: below
    "towers/clip_text": [
        {"width": 24, "heads": 2, "layers": 2},
        {"width": 24, "heads": 2, "mask_token": True},
        {"width": 24, "heads": 2, "layers": 1, "causal": False, "pooling": "first", "projection_bias": True},
    ],
    "towers/clip_vit": [
        {"width": 24, "heads": 2, "layers": 2, "patch_size": 8, "image_size": 32, "registers": 2, "drop_path": 0.2},
        {
            "width": 24,
            "heads": 2,
            "layers": 1,
            "patch_size": 8,
            "image_size": 32,
            "mask_token": True,
            "layer_scale": 1e-2,
            "patch_bias": True,
            "pooling": "mean",
            "norm_after_pool": True,
        },
    ],
    "towers/huggingface": [
        {
            "architecture": "bert",
            "config": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
            "mask_token": True,
        }
    ],
    "towers/timm": [],  # its smallest models are too large for the pictures here
}
AROUND: dict[str, Any] = {
    "losses/captioning": {"heads": {"captions": {"type": "caption_decoder", "layers": 1, "width": 16, "num_heads": 2}}},
    "losses/clip": {
        "heads": {
            "both": {"type": "class_and_patches", "heads": 2},
            "second": {"type": "projection", "layers": 1, "batch_norm": False, "output_dim": 32},
        }
    },
    **dict.fromkeys((f"losses/{name}" for name in ("coding_rate", "dino", "ibot", "lightly")), DINO),
}


def cases() -> list[Any]:
    """Every own part of the kinds that can be checked, with each set of options."""
    found = []
    for record in OWN:
        name = f"{record.group}/{record.name}"
        if record.group in CHECKS:
            found += [
                pytest.param(record, options, id=f"{name}-{i}") for i, options in enumerate(OPTIONS.get(name, [{}]))
            ]
    return found


@pytest.mark.parametrize(("record", "options"), cases())
def test_own_part(record: registry.Record, options: dict[str, Any]) -> None:
    ranks = {"ranks": 2} if record.group == "losses" else {}
    CHECKS[record.group](record.qualified, around=AROUND.get(f"{record.group}/{record.name}"), **ranks, **options)


@pytest.mark.parametrize("record", OWN, ids=lambda record: f"{record.group}/{record.name}")
def test_options_of_every_own_part_are_described(record: registry.Record) -> None:
    testing.check_options(record.group, record.qualified)


def test_frozen_teacher(tmp_path: Path) -> None:
    testing.small_run(tmp_path, steps=1)
    testing.check_teacher("frozen", checkpoint=str(tmp_path / "run"))


# ---------------------------------------------------------------------------- what the checks find


class Sound(Loss):
    """A loss without fault.

    ``scale``: of the term.
    """

    def __init__(self, spec: Spec, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))
        self.register_buffer("steps", torch.zeros(()))

    def requires(self) -> Sequence[Need]:
        return [Need(modality="image", group="global")]

    def forward(self, ctx: StepContext) -> LossOutput:
        self.steps += 1
        x = ctx.student.image["global"].unit
        return LossOutput(terms={"term": self.weight * (x[0] * x[1]).sum(-1).mean() / self.steps})


class Undocumented(Sound):
    """A loss."""


class WrongDefault(Sound):
    """``scale``: of the term."""

    def __init__(self, spec: Spec, *, scale: float = "large") -> None:  # type: ignore[assignment]
        super().__init__(spec)


class CountsInPython(Sound):
    """``scale``: of the term."""

    calls = 0

    def forward(self, ctx: StepContext) -> LossOutput:
        self.calls += 1
        return LossOutput(terms={"term": super().forward(ctx).terms["term"] * self.calls})


class KeepsItsCentre(Sound):
    """``scale``: of the term."""

    def __init__(self, spec: Spec, *, scale: float = 1.0) -> None:
        super().__init__(spec, scale=scale)
        self.register_buffer("steps", torch.zeros(()), persistent=False)


class DrawsFromNumpy(Sound):
    """``scale``: of the term."""

    def __init__(self, spec: Spec, *, scale: float = 1.0) -> None:
        super().__init__(spec, scale=float(np.random.default_rng().random()))


class StaysOnTheCpu(Sound):
    """``scale``: of the term."""

    def __init__(self, spec: Spec, *, scale: float = 1.0) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.ones((), device="cpu"))


class UsesTheStepAfterwards(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        self.last = super().forward(ctx).terms["term"]
        return LossOutput(terms={"term": self.last})

    @torch.no_grad()
    def after_step(self) -> None:
        self.weight.sub_(0.01 * self.last)


class PutsAnotherBuffer(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        found = super().forward(ctx)
        self.steps = self.steps * 2
        return found


class StaysOnItsRank(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        x = ctx.student.image["global"].unit
        return LossOutput(terms={"term": self.weight * (x[0] @ x[1].T).logsumexp(1).mean()})


class CentresByItsRank(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        self.steps.copy_(ctx.student.image["global"].unit.detach().mean())
        x = ctx.student.image["global"].unit
        return LossOutput(terms={"term": self.weight * (x[0] * x[1]).sum(-1).mean()})


class WaitsForTheOther(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        if len(ctx.views) < 6:
            raise KeyError("my samples")
        return super().forward(ctx)


class ReadsTheTeacher(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        return LossOutput(terms={"term": ctx.teacher.text["local"].unit.mean()})  # type: ignore[union-attr]


class ReadsTokens(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        return LossOutput(terms={"term": ctx.student.image["global"].tokens.mean()})  # type: ignore[union-attr]


class ReadsAHead(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        return LossOutput(terms={"term": ctx.gathered["teacher"].heads["cross"]["text"].mean()})


class DividesByZero(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        return LossOutput(terms=super().forward(ctx).terms, metrics={"ratio": self.weight.detach() / 0})


class ForgetsItsWeight(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        return LossOutput(terms={"term": ctx.student.image["global"].unit.std()})


class GivesNumbers(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        return LossOutput(terms=super().forward(ctx).terms, metrics={"x": 1.0})  # type: ignore[dict-item]


class ChangesItsInput(Sound):
    """``scale``: of the term."""

    def forward(self, ctx: StepContext) -> LossOutput:
        projected = ctx.student.image["global"].projected
        assert projected is not None
        projected.detach().clamp_(-1, 1)
        return super().forward(ctx)


class RulesForNothing(Sound):
    """``scale``: of the term."""

    def parameter_rules(self) -> Sequence[ParameterRule]:
        return [ParameterRule(match="wieght", lr_scale=2.0)]


class AsksTooMuch(Sound):
    """``scale``: of the term."""

    def requires(self) -> Sequence[Need]:
        return [Need(modality="image", group="huge")]


class Plain(Head):
    """A head without fault: two maps of projected features."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(spec.embed_dim, 5), nn.Linear(spec.embed_dim, 7)

    def outputs(self) -> Mapping[str, int]:
        return {"a": 5, "b": 7}

    def requires(self, outputs: Collection[str]) -> Sequence[Need]:
        return [Need(modality="image", group="global")]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        x = features.image["global"].projected
        return {name: self.get_submodule(name)(x) for name in outputs}

    def unread(self, outputs: Collection[str]) -> Sequence[str]:
        return [f"{name}.*" for name in ("a", "b") if name not in outputs]


class Labels(Plain):
    """One of its outputs takes no gradient: the largest of the other."""

    def outputs(self) -> Mapping[str, int]:
        return {"a": 5, "label": 1}

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        x = self.a(features.image["global"].projected)
        return {"a": x, "label": x.argmax(-1, keepdim=True).float()}

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        del self.b

    def unread(self, outputs: Collection[str]) -> Sequence[str]:
        return () if "a" in outputs else ("a.*",)


class Captions(Plain):
    """Predicts the tokens of a picture's text, which no tower reads."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        del self.b
        self.a = nn.Linear(spec.embed_dim, spec.vocab_size)

    def outputs(self) -> Mapping[str, int]:
        return {"a": 1}

    def requires(self, outputs: Collection[str]) -> Sequence[Need]:
        return [*super().requires(outputs), Need(modality="text", group="global", kind="views")]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        scores = self.a(features.image["global"].projected).log_softmax(-1)
        return {"a": scores.gather(-1, views.text["global"].tokens).mean(-1, keepdim=True)}


class ReadsLocals(Plain):
    """Reads more than it asks for."""

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        return {name: self.get_submodule(name)(features.stack("text", "pooled", "local")) for name in outputs}


class WrongWidth(Plain):
    """``b`` is wider than it says."""

    def outputs(self) -> Mapping[str, int]:
        return {"a": 5, "b": 6}


class GivesIntegers(Plain):
    """Rounds."""

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        return {name: x.long() for name, x in super().forward(features, views, outputs).items()}


class ReadsAll(Plain):
    """Knows of no unread parameters."""

    def unread(self, outputs: Collection[str]) -> Sequence[str]:
        return ()


class Mixes(Plain):
    """Centres over the batch."""

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        return {name: x - x.mean(1, keepdim=True) for name, x in super().forward(features, views, outputs).items()}


class MatchesByNothing(Plain):
    """Says that it matches, and cannot."""

    matches = True


class DependsOnTheOther(Plain):
    """One output changes with the company."""

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        return {name: x * len(outputs) for name, x in super().forward(features, views, outputs).items()}


class Corner(Augmenter):
    """An augmenter without fault: a corner of the picture, shifted by chance."""

    modality: ClassVar[Modality] = "image"

    def __init__(self, spec: Spec) -> None:
        self.size = 16

    def offers(self) -> Mapping[str, ViewSpec]:
        return {"global": ViewSpec(views=1, size=self.size)}

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        shift = int(rng.integers(4))
        pixels = sample.decode()[None, :, shift : shift + self.size, : self.size]
        return {"global": ImageCrops(pixels=pixels.contiguous(), params=torch.rand(1, 1) * 0)}

    def finish(self, group: CropGroup) -> ImageGroup:
        return group.finished(group.pixels / 255)


class GlobalRandomness(Corner):
    """Draws from Python's generator."""

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        return super().crop(sample, np.random.default_rng(random.getrandbits(32)))


class WrongCrops(Corner):
    """Gives floats."""

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        crops = super().crop(sample, rng)["global"]
        return {"global": replace(crops, pixels=crops.pixels.float())}


class OtherGroups(Corner):
    """Names its group otherwise."""

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        return {"local": super().crop(sample, rng)["global"]}


class TakesAnything(Corner):
    """Sees a picture where there is none."""

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        return {"global": ImageCrops(pixels=torch.zeros(1, 3, 16, 16, dtype=torch.uint8), params=torch.zeros(1, 0))}


class DrawsOnTheDevice(Corner):
    """Draws in finish."""

    def finish(self, group: CropGroup) -> ImageGroup:
        return group.finished(group.pixels / 255 + torch.rand(()))


class WholeBatch(Corner):
    """Normalises by the batch."""

    def finish(self, group: CropGroup) -> ImageGroup:
        pixels = group.pixels.float()
        return group.finished((pixels - pixels.mean()) / pixels.std())


class InPlace(Corner):
    """Changes its crops."""

    def finish(self, group: CropGroup) -> ImageGroup:
        return group.finished(group.pixels.add_(1).float())


class Copy(Teacher):
    """A teacher without fault: the student as it was a step ago."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()

    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        self.model.load_state_dict(student.state_dict())
        return {"momentum": 0.0}


class Same(Copy):
    """The student itself."""

    def start(self, build: Callable[[], nn.Module], student: nn.Module) -> None:
        self.model = student


class Learns(Copy):
    """Takes gradients."""

    def start(self, build: Callable[[], nn.Module], student: nn.Module) -> None:
        self.model = build()


class MovesTheStudent(Copy):
    """Pulls the student back."""

    @torch.no_grad()
    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        for own, other in zip(self.model.parameters(), student.parameters(), strict=True):
            other.lerp_(own, 0.5)
        return {}


class Remembers(Copy):
    """Follows every second time."""

    calls = 0

    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        self.calls += 1
        return super().update(student, progress) if self.calls % 3 == 0 else {}


class Silent(Copy):
    """Returns nothing."""

    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        return None  # type: ignore[return-value]


class Descent(Optimizer):
    """An optimiser without fault."""

    def __init__(self, spec: Spec) -> None:
        pass

    def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


class Ascent(Descent):
    """Goes up."""

    def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1, maximize=True)


class OwnRate(Descent):
    """Does not read the groups."""

    class Fixed(torch.optim.SGD):
        """Moves by one rate."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad

    def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        return self.Fixed(groups, lr=0.1)


class Factored(Descent):
    """Keeps a row where the parameter is a matrix."""

    def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups)


class Falling(Schedule):
    """A schedule without fault."""

    def __init__(self, spec: Spec) -> None:
        pass

    def left(self, progress: Progress, begin: int = 0) -> float:
        return 1 - progress.fraction


class SaysStable(Falling):
    """Depends on the length, and says that it does not."""

    def stable_steps(self, total_steps: int, begin: int = 0) -> int:
        return total_steps


class Overshoots(Falling):
    """Goes below the end."""

    def left(self, progress: Progress, begin: int = 0) -> float:
        return 1 - 2 * progress.fraction


class Counts(Falling):
    """Falls by its calls."""

    calls = 0

    def left(self, progress: Progress, begin: int = 0) -> float:
        self.calls += 1
        return 1 / self.calls


@pytest.mark.parametrize("cls", [UsesTheStepAfterwards, Plain, Labels, Corner, Copy, Descent, Falling])
def test_sound_parts_pass(cls: type[Any]) -> None:
    check = {
        Loss: testing.check_loss,
        Head: testing.check_head,
        Augmenter: testing.check_augmenter,
        Teacher: testing.check_teacher,
        Optimizer: testing.check_optimizer,
        Schedule: testing.check_schedule,
    }
    check[next(base for base in cls.__mro__ if base in check)](cls)  # type: ignore[operator]


def test_a_head_may_read_texts_that_no_tower_encodes(tmp_path: Path) -> None:
    pictures = {"model": {"text": None}, "heads": {"cross": None}}
    testing.check_head(Captions, around=pictures)
    losses = {"clip": None, "distill": None, "caption": {"type": testing.examples.reader(Need(head="caption"))}}
    heads = {"cross": None, "caption": {"type": Captions}}
    (row,) = testing.small_run(tmp_path, {**pictures, "heads": heads, "losses": losses, "teacher": None}, steps=1)
    assert row["loss"] == row["loss/caption"]


ON_TWO = partial(testing.check_loss, ranks=2)


class KeepsNothing(Sound):
    """``scale``: of the term."""

    def __init__(self, spec: Spec, *, scale: float = 0.5) -> None:
        super().__init__(spec, scale=scale)
        self.register_buffer("queue", torch.zeros(0, spec.embed_dim))


def test_an_empty_buffer_and_what_batch_norm_takes_away_are_no_fault_on_two_ranks() -> None:
    ON_TWO(KeepsNothing)
    normed = {"heads": {"normed": {"type": "projection", "hidden_dim": 24, "output_dim": 16}}}
    ON_TWO("lightly", around=normed, loss="NTXentLoss", head="normed")


@pytest.mark.parametrize(
    ("check", "cls", "words"),
    [
        (testing.check_loss, Undocumented, "the option 'scale' has no docs"),
        (
            testing.check_loss,
            WrongDefault,
            "the default of 'scale' is none of its own type (float): expected a number, got 'large'",
        ),
        (testing.check_loss, CountsInPython, "one batch and state give two losses: keep state in buffers"),
        (testing.check_loss, KeepsItsCentre, "a copy with the same state gives another loss"),
        (testing.check_loss, DrawsFromNumpy, "two builds with one seed start losses.part.weight differently"),
        (testing.check_loss, StaysOnTheCpu, "losses.part.weight is not on the device that it is built on"),
        (testing.check_loss, PutsAnotherBuffer, "it puts another tensor into the place of its buffer steps, so that"),
        (ON_TWO, StaysOnItsRank, "2 ranks that share a batch find other than one: loss of step 1, loss/part of step"),
        (ON_TWO, CentresByItsRank, "ranks move their buffer steps apart: move it by what all ranks share (all_sum"),
        (ON_TWO, WaitsForTheOther, "on 2 ranks, where one does: rank 0: PluginError: losses.part (the class tests"),
        (
            testing.check_loss,
            ReadsTheTeacher,
            'Add Need(role="teacher", modality="text", group="local") to it',
        ),
        (
            testing.check_loss,
            ReadsTokens,
            'does not ask for. Add Need(modality="image", group="global", kind="tokens") to it',
        ),
        (
            testing.check_loss,
            ReadsAHead,
            'Add Need(role="teacher", gathered=True, head="cross", outputs=("text",)) to it',
        ),
        (testing.check_head, ReadsLocals, 'Add Need(modality="text", group="local", kind="pooled") to it'),
        (testing.check_loss, DividesByZero, "part/ratio is not finite"),
        (testing.check_loss, ChangesItsInput, "changed its input of shape [2, 6, 32] in place"),
        (testing.check_head, GivesIntegers, "returned 'a' as torch.int64 on cpu, expected floats on cpu"),
        (testing.check_loss, ForgetsItsWeight, "no gradient reaches losses.part.weight"),
        (testing.check_loss, GivesNumbers, "returned 'x' as float, expected a scalar tensor"),
        (testing.check_loss, RulesForNothing, "the parameter rule 'wieght' matches none of its parameters: weight"),
        (testing.check_loss, AsksTooMuch, "reads the image views 'huge', which augmenters.image does not make"),
        (testing.check_loss, Plain, "is no Loss"),
        (testing.check_head, WrongWidth, "returned 'b' of shape [2, 6, 7], expected [V, 6, 6]"),
        (testing.check_head, ReadsAll, "unread(['a']) is wrong about b.bias, b.weight"),
        (
            testing.check_head,
            Mixes,
            "the output 'a' of a sample depends on others of the batch: say so with mixes_samples",
        ),
        (testing.check_head, MatchesByNothing, "lacks match_needs, match_input or match"),
        (testing.check_head, DependsOnTheOther, "the output 'a' is another one when asked for alone"),
        (
            testing.check_augmenter,
            GlobalRandomness,
            "crop gives other views for the same sample and rng: all randomness",
        ),
        (
            testing.check_augmenter,
            WrongCrops,
            "crop gave 'global' as torch.float32 [1, 3, 16, 16], expected ImageCrops of uint8 [1, 3, 16, 16]",
        ),
        (
            testing.check_augmenter,
            OtherGroups,
            "crop gave the groups ['local'], expected those that it offers, ['global']",
        ),
        (testing.check_augmenter, TakesAnything, "crop takes a picture that cannot be decoded"),
        (testing.check_augmenter, DrawsOnTheDevice, "finish draws random numbers for 'global'"),
        (testing.check_augmenter, WholeBatch, "finish gives sample 0 of 'global' other pixels in a batch than alone"),
        (testing.check_augmenter, InPlace, "changed its input of shape [1, 4, 3, 16, 16] in place"),
        (testing.check_teacher, Same, "takes gradients: a teacher must not"),
        (testing.check_teacher, Learns, "takes gradients: a teacher must not"),
        (testing.check_teacher, MovesTheStudent, "update changes image.class_token"),
        (testing.check_teacher, Remembers, "a copy with the same state moves model.image.class_token"),
        (testing.check_optimizer, Ascent, "along the gradient, expected against it"),
        (testing.check_optimizer, OwnRate, "at a learning rate of 0: read group['lr'] in each step"),
        (testing.check_optimizer, Factored, "expected that of the parameter, "),
        (testing.check_schedule, SaysStable, "of which stable_steps says that 2 are the same"),
        (testing.check_schedule, Overshoots, "expected a number from 0 to 1"),
        (testing.check_schedule, Counts, "it must be a function of its arguments"),
        (testing.check_teacher, Silent, "returned None from update, expected a mapping of names to numbers"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_faults_are_found_and_named(check: Callable[[type[Any]], None], cls: type[Any], words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check(cls)
    message = str(caught.value)
    assert words in message and f"{cls.__module__}:{cls.__qualname__}" in message, message


def test_a_name_that_cosmos_ssl_offers_too_means_the_component_of_the_package(install: Callable[..., Path]) -> None:
    source = "from cosmos_ssl.api import Loss, LossOutput, Need\nclass Mine(Loss):\n"
    source += (
        "    def __init__(self, spec): super().__init__()\n    def requires(self): return [Need(modality='image')]\n"
    )
    source += "    def forward(self, ctx): return LossOutput(terms={'x': ctx.no_such_thing})\n"
    install("my-losses", "0.3.1", entries={"losses/clip": "my_losses:Mine"}, modules={"my_losses": source})
    mine = registry.load(registry.find("losses", "my-losses:clip"))
    for part in ("clip", "my-losses:clip", mine):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises((AssertionError, AttributeError), match="no_such_thing"):
                testing.check_loss(part)
        found = [str(each.message) for each in caught if "my-losses 0.3.1 and cosmos-ssl" in str(each.message)]
        assert bool(found) == (part == "clip") and all("Write 'my-losses:clip'" in text for text in found)
    with pytest.warns(UserWarning, match="my-losses:clip"):
        tree = testing.example_config({"losses": {"new": {"type": "clip"}}}).tree
    assert {name: loss["type"] for name, loss in tree["losses"].items()} == {"clip": "clip", "new": "my-losses:clip"}
    install("their-losses", entries={"losses/clip": "my_losses:Mine"})
    with pytest.raises(AssertionError, match="Write 'my-losses:clip' or 'their-losses:clip'"):
        testing.check_loss("clip")


def test_errors_of_a_part_keep_their_kind_and_are_named() -> None:
    class Crashes(Sound):
        """``scale``: of the term."""

        def forward(self, ctx: StepContext) -> LossOutput:
            raise KeyError("no such thing")

    with pytest.raises(
        AssertionError, match=r"Crashes: losses\.part \(.*Crashes.*\) failed: KeyError: 'no such thing'"
    ):
        testing.check_loss(Crashes)


class Curriculum(Corner):
    """A corner whose shift grows with the run."""

    def set_progress(self, progress: Progress) -> None:
        self.most = 1 + progress.step

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        shift = int(rng.integers(self.most))
        pixels = sample.decode()[None, :, shift : shift + 4, :4]
        return {"global": ImageCrops(pixels=pixels.contiguous().repeat(1, 1, 4, 4), params=torch.zeros(1, 1))}


class Ratchet(Curriculum):
    """Never goes back."""

    most = 0

    def set_progress(self, progress: Progress) -> None:
        self.most = max(self.most, 1 + progress.step)


class Warms(Plain):
    """Outputs that grow with the run."""

    def set_progress(self, progress: Progress) -> None:
        self.factor = progress.fraction

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        return {name: x * self.factor for name, x in super().forward(features, views, outputs).items()}


class WarmsByCalls(Warms):
    """Outputs that grow with each call."""

    factor = 0.0

    def set_progress(self, progress: Progress) -> None:
        self.factor += 1


def test_parts_go_by_progress_alone() -> None:
    testing.check_augmenter(Curriculum)
    testing.check_head(Warms)
    with pytest.raises(AssertionError, match="crop gives other views for the same sample and rng"):
        testing.check_augmenter(Ratchet)
    with pytest.raises(AssertionError, match=r"one batch and state give two losses.*go by progress alone"):
        testing.check_head(WarmsByCalls)


class Grows(MultiCrop):
    """Global views that grow with the run."""

    def set_progress(self, progress: Progress) -> None:
        self.side = 24 if progress.fraction < 0.5 else 32

    def offers(self) -> Mapping[str, ViewSpec]:
        return {"global": ViewSpec(views=2)}

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        crops = super().crop(sample, rng)["global"]
        return {"global": replace(crops, pixels=crops.pixels[..., : self.side, : self.side].contiguous())}


class Narrows(ClipViT):
    """A tower that drops patches at first, and tells how many rows it encoded."""

    rows: ClassVar[list[tuple[int, int, bool]]] = []

    def set_progress(self, progress: Progress) -> None:
        self.step = progress.step

    def forward(self, groups: Mapping[str, ImageGroup], plan: Mapping[str, GroupPlan]) -> dict[str, GroupFeatures]:
        self.rows.append((self.step, groups["global"].pixels.shape[-1], self.training))
        return super().forward(groups, plan)


def test_a_run_grows_by_its_steps(tmp_path: Path) -> None:
    """Tower, teacher's copy and augmenter know the step; a run that goes on is the run that never stopped."""
    changes: dict[str, Any] = {
        "model": {"image": {"type": Narrows, "width": 64, "layers": 1, "patch_size": 8, "image_size": 32}},
        "augmenters": {"image": {"type": Grows, "global_crops_size": 32, "local_crops_number": 0}},
        "schedule": {"epochs": 4},
        "checkpoints": {"every_steps": 1, "keep_last": 9},
    }
    rows = testing.small_run(tmp_path / "whole", changes)
    steps = [(step, 24 if step < 2 else 32, training) for step in range(4) for training in (False, True)]
    assert Narrows.rows == steps
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    *kept, last = sorted((tmp_path / "again/run/checkpoints").glob("step_*"))
    shutil.rmtree(last)
    (tmp_path / "again/run/result.json").unlink()
    again = testing.small_run(tmp_path / "again", changes)
    begun = int(kept[-1].name.removeprefix("step_"))
    assert Narrows.rows == steps + steps[2 * begun :]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


# ---------------------------------------------------------------------------- what tests of values are made of


def test_example_features_hold_what_is_asked_for_and_nothing_else() -> None:
    needs = [
        Need(modality="image", group="global", kind="masked_tokens"),
        Need(modality="text", group="local"),
        Need(head="cross"),
    ]
    views = testing.example_views()
    found = testing.example_features(needs)
    assert set(found.image) == {"global"} and set(found.text) == {"local"}
    masks = views.image["global"].masks
    assert masks is not None and found.image["global"].masked_tokens is not None
    assert (
        found.image["global"].masked_tokens.shape == (int(masks.sum()), 32) and found.image["global"].projected is None
    )
    assert found.text["local"].unit.shape == (2, 6, 32) and {
        name: x.shape[-1] for name, x in found.heads["cross"].items()
    } == {
        "image": 32,
        "text": 32,
    }
    assert (masks.sum(-1) == 0).any() and (masks.sum(-1) > 0).any()


def test_example_context_is_what_a_loss_reads() -> None:
    loss = Sound(testing.example_spec(), scale=3.0)
    ctx = testing.example_context(loss)
    a, b = ctx.student.image["global"].unit.detach()
    torch.testing.assert_close(loss(ctx).terms["term"], 3 * (a * b).sum(-1).mean())


def test_example_spec_is_that_of_the_example_config() -> None:
    from cosmos_ssl.testing.examples import example_assembly

    built = example_assembly(testing.example_config()).spec
    assert replace(built, steps_per_epoch=5, epochs=2) == testing.example_spec()


class Undocumented(Callback):
    """It breaks the contract, and says nothing of its option."""

    watches = True

    def __init__(self, spec: Spec, *, harm: bool = True) -> None:
        self.harm = harm

    @torch.no_grad()
    def before_step(self, ctx: CallbackContext) -> None:
        if self.harm:
            next(ctx.model.parameters()).add_(1)


def test_missing_docs_hide_no_breach() -> None:
    with pytest.raises(AssertionError, match=r"before_step changes .*: and says that it watches alone"):
        testing.check_callback(Undocumented)
    with pytest.raises(AssertionError, match="the option 'harm' has no docs"):
        testing.check_callback(Undocumented, harm=False)
