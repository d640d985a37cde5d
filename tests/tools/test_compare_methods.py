"""The comparison of methods: that it is fair, that peaks are judged rightly, and that all of it runs and goes on."""

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl.config import load_config
from cosmos_ssl.data.scenes import CLASS_NAMES, SceneOptions, write_scenes

TOOL = Path(__file__).parents[2] / "tools" / "compare_methods.py"
SIDE, PATCH = 32, 8


@pytest.fixture(scope="module")
def tools():
    """The modules of the program, by name."""
    names = ("measure", "plan", "report", "tuning")
    sys.path.insert(0, str(TOOL.parent))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"comparison.{name}") for name in names})
    finally:
        sys.path.remove(str(TOOL.parent))


RECIPES = ("cosmos", "cosmos_fast", "clip", "siglip", "clip_texts", "clip_multi_crop", "silc")


def test_runs_differ_by_the_method_and_its_learning_rate_alone():
    configs = {method: load_config(f"compare/{method}.yaml").config for method in RECIPES}
    cosmos = configs["cosmos"]
    for name, config in configs.items():
        for section in ("model", "tokenizer", "data", "loader", "schedule", "training", "evaluators"):
            assert getattr(config, section) == getattr(cosmos, section), section
        assert config.optimizer.model_dump() | {"lr": 0} == cosmos.optimizer.model_dump() | {"lr": 0}
        moved = "after" if name == "silc" else "before"  # as each paper moves its teacher
        assert config.teacher.options == cosmos.teacher.options
        assert config.teacher.update_when == f"{moved}_optimizer_step"
        views = config.augmenters.image.options, config.augmenters.text.options
        if name not in ("clip", "siglip", "clip_texts"):
            differs = ["local_crops_number"]
            if name == "cosmos_fast":
                differs = ["global_crops_number", "color_jitter_prob", "gaussian_blur_probs"]
            found, expected = (
                {key: value for key, value in options.items() if key not in differs}
                for options in (views[0], cosmos.augmenters.image.options)
            )
            assert found == expected
        assert views[1] | {"num_sampled_captions": 4} == cosmos.augmenters.text.options
    losses = [[loss.type for loss in config.losses.values()] for config in configs.values()]
    both = ["clip", "cross_modality_distillation"]
    assert losses == [both, both, ["clip"], ["siglip"], ["clip"], ["clip"], ["clip", "dino"]]


def test_what_a_method_costs_is_the_mean_over_its_run(tools):
    """A distillation that begins half-way costs what COSMOS does for 4 steps of 8, and for the first."""

    def flops(recipe, *own):
        small = ("model.image.width=64", "model.image.layers=1", "data.train_samples=256", "schedule.epochs=4")
        return tools.plan.make_method("x", "X", recipe, (*small, *own)).flops

    half = "{type: warmup_stable_decay, decay: at_once, decay_share: 0.5, start: 0.0, end: 1.0}"
    from_half, always = (flops("cosmos_fast", f"losses.distill.loss_weight={weight}") for weight in (half, 1.0))
    never = flops("clip_texts")
    assert from_half == pytest.approx((5 * always + 3 * never) / 8, rel=1e-3)
    assert always > 1.5 * never


# ---------------------------------------------------------------------------- settings


def test_every_method_has_as_many_trials(tools):
    for recipe in RECIPES:
        axes = tools.tuning.Axes.of(SimpleNamespace(recipe=recipe, overrides=()))
        first = axes.first()
        trials = [*first, *axes.second(dict(zip(first, (1.0, 3.0, 2.0), strict=True)))]
        assert len(trials) == len(set(trials)) == tools.tuning.TRIALS
        load_config(f"compare/{recipe}.yaml", trials[-1])  # each is a config
        learns = any(len(trial) == 2 and trial[1].startswith("teacher.momentum_teacher=") for trial in trials)
        assert learns == (recipe in ("silc", "cosmos", "cosmos_fast"))


def test_the_best_value_of_each_setting_is_taken(tools):
    axes = tools.tuning.Axes(rate=1.0, others={"crops": [[1, 1], [2, 2]], "momentum": [0.9, 0.8, 0.7]})
    low, own, high = axes.first()
    found = {low: 1.0, own: 5.0, high: 4.0}
    further, crops, *momenta = axes.second(found)
    assert [trial[0] for trial in (crops, *momenta)] == [*own] * 3
    scored = found | {further: 4.5}
    assert axes.together(scored | {crops: 4.9, momenta[0]: 5.5, momenta[1]: 5.2}) == [*own, momenta[0][1]]
    assert axes.together(scored | {crops: 5.1, momenta[0]: 4.0, momenta[1]: 4.5}) == [*own, crops[1]]
    assert axes.together(found | {further: 5.1, crops: 4.9, momenta[0]: 4.0, momenta[1]: 4.5}) == [*further]


@pytest.mark.parametrize(("scores", "times"), [((1, 3, 2), 1.4), ((2, 3, 1), 0.7), ((1, 2, 3), 4), ((3, 2, 1), 0.25)])
def test_the_fourth_rate_lies_where_the_best_may_be(tools, scores, times):
    axes = tools.tuning.Axes(rate=1.0, others={})
    assert axes.second(dict(zip(axes.first(), scores, strict=True))) == axes.rates(times)


def test_an_equal_cost_is_one_in_whole_epochs(tools):
    make = tools.plan.Method
    cheap = make(key="a", label="A", recipe="clip", overrides=(), epochs=4, epoch_samples=100, flops=2.0)
    dear = make(key="b", label="B", recipe="cosmos", overrides=(), epochs=4, epoch_samples=100, flops=7.0)
    longer = tools.plan.of_equal_cost(cheap, dear)
    assert (longer.key, longer.label, longer.epochs, longer.total) == ("a_longer", "A, 3.5 x samples", 14, 2800.0)


def test_settings_for_real_pictures_are_chosen_on_a_shard_held_out(tools, shards):
    setting = tools.plan.real(pattern := shards(2, 2, 2), "val.tar")
    assert (
        f"data.train_data={pattern}" in setting.overrides and "evaluators.retrieval.data=val.tar" in setting.overrides
    )
    *train, last = sorted(str(path) for path in Path(pattern).parent.glob("*.tar"))
    assert setting.trial == (f"data.train_data={'::'.join(train)}", f"evaluators.retrieval.data={last}")
    with pytest.raises(SystemExit, match="at least two"):
        tools.plan.real(last, "val.tar")


# ---------------------------------------------------------------------------- peaks


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The pattern of some validation scenes, and by picture (its bytes) the exact mask, read without our code."""
    options = SceneOptions(train_samples=1, validation_samples=12, image_size=SIDE)
    folder = write_scenes(tmp_path_factory.mktemp("scenes") / "shards", options)
    with tarfile.open(folder / "val-0000.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    read = {name: np.array(Image.open(io.BytesIO(body))) for name, body in files.items() if name.endswith(".png")}
    pictures = [name for name in read if not name.endswith(".mask.png")]
    return options.pattern(folder, "val"), {
        read[name].tobytes(): read[name.replace(".png", ".mask.png")] for name in pictures
    }


def touched(mask, name):
    """The patches, row by row, that hold a pixel of the object ``name``."""
    label = CLASS_NAMES.index(name) + 1
    steps = range(0, SIDE, PATCH)
    return [bool((mask[y : y + PATCH, x : x + PATCH] == label).any()) for y in steps for x in steps]


class Knowing:
    """A model that knows the masks.

    ``choose`` picks a patch, told which of them hold a named object, and which another one.
    """

    spec = SimpleNamespace(image=SimpleNamespace(patch_size=PATCH))
    device = torch.device("cpu")

    def __init__(self, masks, choose):
        self.masks, self.choose = masks, choose

    def preprocess(self, picture):
        return picture.float()

    def tokenize(self, texts):
        """A row of flags, one a class."""
        return torch.tensor([[name in text[2:].split(" and a ") for name in CLASS_NAMES] for text in texts])

    def encode_text(self, tokens):
        return tokens.float()

    def weights(self, pixels, flags):
        mask = self.masks[pixels.byte().permute(1, 2, 0).contiguous().numpy().tobytes()]
        held = {True: [[False] * (SIDE // PATCH) ** 2], False: [[False] * (SIDE // PATCH) ** 2]}
        for value in np.unique(mask)[1:]:
            held[bool(flags[value - 1])].append(touched(mask, CLASS_NAMES[value - 1]))
        weights = torch.full(((SIDE // PATCH) ** 2,), 0.1)
        weights[self.choose(*(np.any(held[named], 0).tolist() for named in (True, False)))] = 1.0
        return weights

    def dense(self, pixels, *, csa):
        classes = torch.eye(len(CLASS_NAMES))
        return torch.stack([torch.stack([self.weights(x, flags) for flags in classes], -1) for x in pixels]), None

    def cross_attention(self, pixels, tokens):
        return {"text": torch.stack([self.weights(x, flags) for x, flags in zip(pixels, tokens, strict=True)])}


def first(held):
    return held.index(True) if True in held else 0


def test_peaks_on_the_object_are_hits(tools, scenes):
    pattern, masks = scenes
    found = tools.measure.peaks(Knowing(masks, lambda named, _: first(named)), pattern)
    assert found["similarity_peak"] == found["attention_peak"] == 1
    assert found["attention_peak_left_out"] < 0.5  # where a patch holds two objects


def test_peaks_on_what_the_text_leaves_out_are_hits_there(tools, scenes):
    pattern, masks = scenes
    found = tools.measure.peaks(Knowing(masks, lambda _, rest: first(rest)), pattern)
    assert found["attention_peak_left_out"] == 1
    assert found["attention_peak"] < 0.5


def test_peaks_beside_the_object_are_misses(tools, scenes):
    pattern, masks = scenes
    found = tools.measure.peaks(Knowing(masks, lambda named, _: named.index(False)), pattern)
    assert found["similarity_peak"] == found["attention_peak"] == 0


def test_a_fixed_place_hits_what_lies_there(tools, scenes):
    pattern, masks = scenes
    held = [touched(mask, CLASS_NAMES[value - 1]) for mask in masks.values() for value in np.unique(mask)[1:]]
    found = tools.measure.peaks(Knowing(masks, lambda *_: 5), pattern)
    assert (
        found["attention_peak"]
        == found["attention_peak_left_out"]
        == pytest.approx(np.mean([patches[5] for patches in held]))
    )
    assert found["any_patch"] == pytest.approx(np.mean(held), abs=1e-6)


# ---------------------------------------------------------------------------- report and the whole


def test_spread_over_seeds(tools):
    figures = tools.report.row("cosmos/student/top1", [40.0, 50.0, 54.0], "%")
    assert (figures["value"], figures["least"], figures["most"], figures["seeds"]) == (48.0, 40.0, 54.0, 3)
    assert figures["deviation"] == pytest.approx(52**0.5, abs=1e-3)  # (64 + 4 + 36) / 2
    rows = [figures, tools.report.row("clip/student/top1", [30.0], "%")]
    compared = [SimpleNamespace(key=key, label=label) for key, label in (("clip", "CLIP"), ("x", "X"), ("cosmos", "C"))]
    [line] = [
        line for line in tools.report.markdown(rows, compared, "student").splitlines() if "classification" in line
    ]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["30.0", "-", "48.0 (40.0 to 54.0)"]


def test_a_run_that_measured_nothing_is_refused(tools):
    figures = {f"{role}/{name}": 2.0 for role in tools.plan.ROLES for name in tools.plan.RANKS} | {"speed": 9.0}
    method = SimpleNamespace(key="clip", samples=64, flops=1e9)
    tools.report.require_measured(method, [figures])
    for runs in ([], [{}], [figures, figures | {"speed": 0.0}], [dict.fromkeys(figures, 0.0)]):
        with pytest.raises(SystemExit, match="clip measured nothing"):
            tools.report.require_measured(method, runs)


@pytest.mark.slow
def test_all_runs_in_a_tiny_form_and_goes_on(tmp_path, shards):
    def compare(*words):
        command = [
            sys.executable,
            str(TOOL),
            "--quick",
            "--output",
            str(tmp_path / "runs"),
            "--json",
            str(tmp_path / "rows.json"),
            *words,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}

    rows = compare("--methods", "clip", "cosmos", "--seeds", "1")
    figures = ("image_to_text_R@1", "text_to_image_R@5", "top1", "miou", "similarity_peak", "any_patch")
    for method in ("clip", "cosmos"):
        assert all(
            0 <= rows[f"{method}/{role}/{name}"]["value"] <= 100 for role in ("student", "teacher") for name in figures
        )
    assert [name for name in rows if name.endswith("attention_peak")] == [
        "cosmos/student/attention_peak",
        "cosmos/teacher/attention_peak",
    ]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*_0/*.json")}
    assert len([path for path in written if path.name == "result.json"]) == 2
    variant = "whole views: cosmos augmenters.image.local_crops_number=0"
    more = compare("--methods", "clip", "cosmos", "--seeds", "2", "--equal-compute", "--variant", variant)
    assert {path: path.stat().st_mtime_ns for path in written} == written  # neither trained nor evaluated again
    assert more["cosmos/student/miou"]["seeds"] == 2
    assert more["clip/flops"]["value"] < more["whole_views/flops"]["value"] < more["cosmos/flops"]["value"]
    spent = {
        method: more[f"{method}/samples"]["value"] * more[f"{method}/flops"]["value"]
        for method in ("clip_longer", "cosmos")
    }
    assert spent["clip_longer"] == pytest.approx(spent["cosmos"], rel=0.2)  # in whole epochs

    real = ["--shards", shards(32, 32, folder="train"), "--held-out", shards(32, folder="val")]
    trained = compare("--methods", "clip", "--seeds", "1", "--tune", "1", *real, "--output", str(tmp_path / "real"))
    assert 1 <= trained["clip/student/image_to_text_mean_rank"]["value"] <= 32
    assert len(json.loads((tmp_path / "rows.json").read_text())["trials"]["clip"]) == 6
