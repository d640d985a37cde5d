"""A run small enough for a test, of parts made for it. Also a program: python tiny.py RUN_DIR CONFIG_JSON."""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from cosmos_ssl import registry
from cosmos_ssl.api import (
    Augmenter,
    BadSample,
    Callback,
    Curve,
    Dataset,
    Evaluation,
    Evaluator,
    GroupFeatures,
    ImageCrops,
    ImageGroup,
    Loss,
    LossOutput,
    Need,
    ParameterRule,
    Sample,
    Spec,
    Tower,
    TowerSpec,
    ViewSpec,
    Writer,
)
from cosmos_ssl.config import Config
from cosmos_ssl.data import Manifest, Shards
from cosmos_ssl.engine.assembly import Assembly, ScheduledEvaluator
from cosmos_ssl.engine.distributed import joined_world
from cosmos_ssl.engine.trainer import Trainer
from cosmos_ssl.errors import CosmosError
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import make_plan
from cosmos_ssl_plugins.teachers.ema import Ema
from cosmos_ssl_plugins.teachers.none import NoTeacher

SAMPLES = 20
WIDTH = 6


faults: dict[str, dict[int, str]] = {}
"""What befalls this process, in ``loss`` or ``teacher`` at a step and in ``crop`` at a call, both from 0.

``die``, ``hang``, ``raise``, ``slow``; ``stick``: hang with the interpreter's lock; ``limit``: no file may exceed 100
kB from now on; ``drift``: the teacher, or at its ``start`` the model, becomes another.
"""


def befall(place, number):
    what = faults.get(place, {}).get(number)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    if what == "stick":
        ctypes.PyDLL(None).sleep(600)
    if what == "slow":
        time.sleep(0.5)
    if what == "raise":
        raise RuntimeError(f"no {place} any more")
    if what == "hang":
        print("hangs", flush=True)
        time.sleep(600)
    return what


@torch.no_grad()
def drift(model):
    next(iter(model.parameters())).add_(0.1)


class Numbers(Dataset):
    """Samples that are their own index; ``bad`` ones cannot be used."""

    def __init__(self, bad=()):
        self.bad = set(bad)

    def prepare(self):
        pass

    @property
    def shard_sizes(self):
        return np.array([SAMPLES // 2, SAMPLES - SAMPLES // 2])

    def read(self, index):
        if index in self.bad:
            raise BadSample("undecodable")
        return Sample(key=f"s{index}", extras={"index": index})


class Noise(Augmenter):
    """Two views: the sample's index and noise."""

    modality = "image"

    def __init__(self):
        self.calls = 0

    def offers(self):
        return {"global": ViewSpec(views=2, size=2)}

    def crop(self, sample, rng):
        befall("crop", self.calls)
        self.calls += 1
        noise = torch.from_numpy(rng.integers(0, 100, (2, 3, 2, 2), dtype=np.uint8))
        return {"global": ImageCrops(pixels=noise + sample.extras.get("index", 0), params=torch.zeros(2, 0))}

    def finish(self, group):
        return ImageGroup(pixels=group.pixels.float() / 255, params=group.params)


class Flat(Tower):
    """Two linear maps with dropout between them, which draws on the device's randomness."""

    modality = "image"

    def __init__(self):
        super().__init__()
        self.layer_count = 2
        self.spec = TowerSpec(width=WIDTH, image_size=2, patch_size=1)
        self.stem = nn.Linear(12, WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)

    def layer_of(self, name):
        return 0 if name.startswith("stem") else 2

    def parameter_rules(self):
        return [ParameterRule(match="stem.bias", lr_scale=0.5)]

    def forward(self, groups, plan):
        found = {}
        for name, group in plan.items():
            pooled = torch.tanh(self.stem(groups[name].pixels[list(group.views)].flatten(2)))
            projected = self.projection(F.dropout(pooled, 0.2, self.training))
            found[name] = GroupFeatures(views=group.views, pooled=pooled, projected=projected)
        return found


class Match(Loss):
    """Pull the views of a sample together and towards the teacher; a buffer counts the calls; poisoned steps give
    NaN.
    """

    poison: Mapping[int, str] = {}

    def __init__(self, teacher=True):
        super().__init__()
        self.teacher = teacher
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def requires(self):
        return [Need(modality="image"), *([Need(role="teacher", modality="image")] if self.teacher else [])]

    def forward(self, ctx):
        self.calls += 1
        self.last = ctx.progress.step  # for ``after_step``, which is the student's loss's alone
        befall("loss", ctx.progress.step)
        x = ctx.student.image["global"].unit
        y = ctx.teacher.image["global"].unit if self.teacher else x.detach()
        loss = (1 - (x[0] * y[1]).sum(-1)).mean() * self.scale + (x.mean(1).square().sum() - 0.5).square()
        if ctx.progress.step in self.poison:
            loss = {
                "loss": loss * float("nan"),
                "gradient": loss + ((self.scale - self.scale.detach()).clamp_min(0).sqrt() * 0).sum(),
            }[self.poison[ctx.progress.step]]
        return LossOutput(terms={"pull": loss}, metrics={"scale": self.scale})

    @torch.no_grad()
    def after_step(self):
        assert self.last >= 0
        self.scale.clamp_(0, 2)


class Average(Ema):
    """The moving average, for faults."""

    def update(self, student, progress):
        if befall("teacher", progress.step) == "drift":
            drift(self.model)
        return super().update(student, progress)


class Mean(Evaluator):
    """The mean feature's length; draws random numbers, and stays ``seconds`` so that a signal can find it."""

    modalities = ("image",)

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.calls = 0

    def evaluate(self, encoder, *, pictures=False):
        self.calls += 1
        if self.seconds:
            print("evaluates", flush=True)
        end = time.monotonic() + self.seconds
        while True:
            features = encoder.encode_image(torch.rand(4, 3, 2, 2))
            if time.monotonic() >= end:
                break
        grid = torch.zeros(3, 4, 4, dtype=torch.uint8)
        return Evaluation(metrics={"mean": features.mean(0).norm().item()}, pictures={"grid": grid} if pictures else {})


class Shake(Callback):
    """Noise on all parameters after each step, and a sum over what epochs measured; asks for the end after ``last``."""

    def __init__(self, last=None):
        self.last, self.total, self.drawn, self.hooks = last, 0.0, torch.zeros(3), []

    def start(self, ctx):
        self.hooks.append(("start", ctx.progress.step))

    def before_step(self, ctx):
        self.drawn += torch.rand(3)

    @torch.no_grad()
    def after_step(self, ctx):
        for parameter in ctx.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)

    def at_epoch(self, ctx):
        self.hooks.append(("epoch", ctx.progress.step))
        self.total += sum(ctx.metrics[name] for name in sorted(ctx.metrics) if name == "loss" or "mean" in name)
        ctx.writers.scalars(ctx.progress.step, {"shaken": self.total})
        if self.last is not None:
            ctx.keep()
        if self.last is not None and ctx.progress.step >= self.last:
            ctx.stop("enough")

    def at_checkpoint(self, ctx):
        self.hooks.append(("checkpoint", ctx.progress.step))

    def state_dict(self):
        return {"total": self.total, "drawn": self.drawn}

    def load_state_dict(self, state):
        self.total, self.drawn = state["total"], state["drawn"]


class Tracker(Writer):
    """A service that can only append, as it stands over all starts of a run: rows by run, in the order given."""

    appends = True

    def __init__(self):
        self.runs = {}

    def start(self, run):
        self.rows = self.runs.setdefault(run.id, [])

    def scalars(self, step, values):
        self.rows += [(step, name, value) for name, value in values.items() if name != "epoch"]

    def check(self, run_dir, rows):
        """Each row is there once per run of the service, steps never fall, and the last run has what stays."""
        for given in self.runs.values():
            steps, names = [step for step, *_ in given], [(step, name) for step, name, _ in given]
            assert steps == sorted(steps) and len(names) == len(set(names))
        stays = {(row["step"], name, row[name]) for row in rows(run_dir) for name in row.keys() - {"step", "epoch"}}
        known = {name for _, name, _ in stays}
        given = {row for row in self.rows if row[1] in known}
        assert given == {row for row in stays if row[0] >= self.rows[0][0]}
        return [(run_id.partition("-")[2], given[0][0], given[-1][0]) for run_id, given in self.runs.items() if given]


def make_config(**sections) -> Config:
    """A config of 5 steps an epoch and 2 epochs, with ``sections`` merged over it."""
    tree = {
        "name": "tiny",
        "data": {"type": "numbers"},
        "training": {"batch_size": 4, "precision": "fp32", "device": "cpu", "seed": 3},
        "schedule": {"epochs": 2, "warmup_steps": 2},
        "optimizer": {"lr": 0.05, "weight_decay": 0.1},
        "loader": {"workers": 0},
        "checkpoints": {"every_steps": 3, "every_minutes": None},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return Config.model_validate_json(json.dumps(tree))


def moving(config, spec):
    """The optimiser and the schedule of a config."""
    named = {"optimizer": "optimizers", "schedule": "schedules"}
    sections = {key: getattr(config, key) for key in named}
    if isinstance(config.optimizer.weight_decay, Curve):
        curve = config.optimizer.weight_decay
        curve.follow(registry.load(registry.find("schedules", curve.type))(spec, **curve.model_extra))
    return {
        key: registry.load(registry.find(named[key], section.type))(spec, **section.options)
        for key, section in sections.items()
    }


def make_assembly(config, *, teacher=True, evaluators=None, bad=(), before=True, dataset=None, **beside) -> Assembly:
    """The parts, wired by hand; ``dataset`` stands in for the numbers; ``beside``: writers, callbacks."""
    torch.manual_seed(config.training.seed)
    augmenter = Noise()
    spec = Spec(embed_dim=WIDTH, seed=config.training.seed, has_teacher=teacher, image_views=augmenter.offers())

    def build():
        return Model({"image": Flat()}, {}, {"match": Match(teacher)})

    model = build()
    return Assembly(
        spec=spec,
        dataset=dataset or Numbers(bad),
        tokenizer=None,
        augmenters={"image": augmenter},
        model=model,
        build_model=build,
        teacher=Average(spec, momentum_teacher=0.9) if teacher else NoTeacher(spec),
        update_when="before_optimizer_step" if before else "after_optimizer_step",
        plan=make_plan(spec, model.towers, {}, {"match": model.loss("match")}),
        loss_weights={"match": 1.0},
        **moving(config, spec),
        evaluators={name: ScheduledEvaluator(evaluator=e, every_epochs=1) for name, e in (evaluators or {}).items()},
        parts={"losses.match": "match (tests)"},
        **beside,
    )


def make_trainer(run_dir, config=None, console=None, writers=(), **options) -> Trainer:
    """A trainer into ``run_dir``; ``options`` as of ``make_assembly``."""
    config = config or make_config()
    return Trainer(
        make_assembly(config, **options),
        config,
        run_dir,
        console=console or Console(file=io.StringIO()),
        writers=writers,
    )


def raise_loss(trainer, batches, seen=None, factor=4.0):
    """Let the loss be so many times as large on these batches of the order, noting in ``seen`` each that is taken."""
    loss, order = trainer.assembly.model.loss("match"), trainer.order
    forward = loss.forward

    def scaled(ctx):
        out, place = forward(ctx), order.place(ctx.progress.step)
        if seen is not None:
            seen.append(place)
        return LossOutput(terms={"pull": out.terms["pull"] * (factor if place in batches else 1)}, metrics=out.metrics)

    loss.forward = scaled


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    if options.pop("stuck_start", False):
        Numbers.identity = lambda self: print("starting", flush=True) or time.sleep(600)
    befalls = options.pop("befalls", {}).get(os.environ.get("RANK", "0"), {})  # one rank alone
    faults |= {place: {int(number): what for number, what in found.items()} for place, found in befalls.items()}
    Match.poison = faults.pop("poison", {})
    Match.part_source = Average.part_source = Noise.part_source = "tests"
    WIDTH = options.pop("width", WIDTH)
    raised = options.pop("raised", ())
    parts = {"evaluators": {"mean": Mean(options.pop("evaluation_seconds", 0.0))}, "bad": options.pop("bad", ())}
    if options.pop("shake", False):
        parts["callbacks"] = {"shake": Shake()}
    if shards := options.pop("shards", None):  # as they were when they were indexed
        parts["dataset"] = Shards(
            shards["urls"], caption_schema=None, manifest=Manifest.open(Path(shards["manifest"]), shards["urls"])
        )
    try:
        with joined_world("cpu"):
            console = Console(quiet="RANK" in os.environ and os.environ["RANK"] != "0")
            trainer = make_trainer(Path(sys.argv[1]), make_config(**options), console, **parts)
            raise_loss(trainer, raised)
            if befall("start", 0) == "drift":
                drift(trainer.assembly.model)
            trainer.train()
    except CosmosError as error:
        print(error)
        sys.exit(error.exit_code)
