"""Every option by evil values, up to the check: a sentence or success, never a traceback, gigabytes or a long wait."""

from __future__ import annotations

import json
import math
import random
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from cosmos_ssl import registry
from cosmos_ssl.build import check
from cosmos_ssl.config import NAMED_GROUPS, Config, load_config, part_paths
from cosmos_ssl.config.source import packaged_configs
from cosmos_ssl.errors import UserError
from cosmos_ssl.testing.examples import small_config

NUMBERS = (-1, 0, 1, 3, 1 << 40, 10**30, -0.5, 0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf)
OTHERS = (
    "",
    "x",
    "a\x1b[31m",
    "\x00",
    True,
    None,
    [],
    {},
    [-1],
    [0, 0],
    [1, 0],
    [math.nan] * 2,
    [1 << 40] * 2,
    [-1] * 3,
    ["x"],
    {"x": 1},
)
KEYS = (-1, 10**30, 1e-300, math.nan, "", "a\x1b[31m", None, [], {"x": 1})
QUICK = (-1, 0, 1 << 40, 1e300, 1e-300, "", [1 << 40] * 2)
SECONDS, BYTES = 60.0, 2 << 30  # a check takes hundredths of the first: this is for hangs

PROTOTYPES = {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 12}
CHANGES: dict[str, Any] = {
    "augmenters": {"image": {"mask_probability": 0.5}},
    "model": {"image": {"mask_token": True}},
    "heads": {
        "cross": {"type": "cross_attention"},
        "project": {"type": "projection", "hidden_dim": 16, "output_dim": 8},
        "dino": {"type": "dino_projection", **PROTOTYPES},
        "dinov2": {"type": "dinov2_projection", **PROTOTYPES},
    },
    "losses": {
        "siglip": {"type": "siglip"},
        "dino": {"type": "dino", "head": "dinov2", "centering": "sinkhorn"},
        "ibot": {"type": "ibot", "head": "dino"},
        "koleo": {"type": "koleo"},
        "ssl": {"type": "lightly", "loss": "NTXentLoss", "head": "project", "options": {"temperature": 0.1}},
    },
    "evaluators": {
        "retrieval": {"type": "retrieval"},
        "classification": {"type": "classification"},
        "health": {"type": "health"},
        "knn": {"type": "knn", "train_data": "x.tar"},
    },
}
"""Nearly every built-in part in one config."""
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VIEWS = {"global": {"number": 2, "size": 32}, "local": {"size": 16}}
INSTEAD: dict[str, Any] = {
    "augmenters.image": {"type": "view_groups", "groups": VIEWS},
    "model.text": {"type": "huggingface", "architecture": "bert", "config": BERT},
    "model.image": {"type": "timm", "model": "test_vit", "image_size": 32},
    "data": {"type": "webdataset", "train_data": "x.tar"},
    "teacher": {"type": "frozen", "checkpoint": "x"},
}
"""Other parts, in whose place they stand, whose options are tried too."""


def changed(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    return {**tree, key: changed(tree[key], rest, value) if rest else value}


def without(tree: Mapping[str, Any], *losses: str) -> dict[str, Any]:
    return changed(tree, "losses", {name: loss for name, loss in tree["losses"].items() if name not in losses})


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The config of nearly all parts, under "", and one for each other part, by the place where it stands."""
    folder = tmp_path_factory.mktemp("options")
    base = load_config(small_config(str(folder), 1, CHANGES)).tree
    found = {"": base}
    for path, part in INSTEAD.items():
        found[path] = changed(base, path, part)
        if path.endswith("image"):  # neither draws masks
            found[path] = without(found[path], "ibot")
    found["crop"] = without(
        changed(base, "augmenters.image", {"type": "resize_crop", "size": 32}), "ibot", "ssl", "dino"
    )  # one view
    for tree in found.values():
        check(load_config(tree))
    return found


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """No more than what is there and ``BYTES``."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def options_of(tree: Mapping[str, Any], below: str = "") -> list[tuple[str, registry.Record, registry.Option]]:
    """Key path, part and option of all parts below a path."""
    found = []
    for path, group, keys in part_paths(tree):
        if path.startswith(below):
            record = registry.find(group, keys["type"])
            found += [
                (f"{path}.{option.name}", record, option) for option in registry.options_of(registry.load(record))
            ]
    return found


def attempt(tree: Mapping[str, Any], what: str) -> None:
    """Check a config; nothing but success and a sentence will do."""
    start = time.perf_counter()
    try:
        check(load_config(tree))
    except UserError as error:
        assert "\x1b" not in str(error), what
        assert "failed when it was built" not in str(error), f"{what}: {error}"
    assert time.perf_counter() - start < SECONDS, what


def accepted(
    record: registry.Record, option: registry.Option, values: Sequence[Any] = (*NUMBERS, *OTHERS)
) -> list[Any]:
    """The evil values that the type of an option lets through."""
    cls = registry.load(record)
    found = [(value, registry.check_options(record, cls, {option.name: value})) for value in values]
    return [value for value, (values, _) in found if option.name in values]


def test_keys_of_sections(trees: dict[str, dict[str, Any]]) -> None:
    tree = trees[""]
    paths = [name for name in Config.model_fields if name not in NAMED_GROUPS]
    paths += [
        f"{name}.{key}"
        for name in paths
        if isinstance(tree[name], dict) and "type" not in tree[name]
        for key in tree[name]
    ]
    paths += [f"losses.clip.{key}" for key in ("type", "loss_weight")] + [
        "evaluators.knn.every_epochs",
        "optimizer.type",
        "optimizer.lr",
    ]
    for path in dict.fromkeys(paths):
        for value in KEYS:
            start = time.perf_counter()
            try:
                load_config(changed(tree, path, value))
            except UserError as error:
                assert path.split(".")[0] in str(error) and "\x1b" not in str(error), (path, value)
            assert time.perf_counter() - start < SECONDS, (path, value)


def test_options_of_parts(trees: dict[str, dict[str, Any]]) -> None:
    for place, tree in trees.items():
        for path, record, option in options_of(tree, "augmenters.image" if place == "crop" else place):
            for value in accepted(record, option, QUICK):
                attempt(changed(tree, path, value), f"{path}={value!r} ({record.name})")


def test_view_groups(trees: dict[str, dict[str, Any]]) -> None:
    from cosmos_ssl_plugins.augmenters.view_groups import ViewGroup

    tree = trees["augmenters.image"]
    for field in fields(ViewGroup):
        for value in (-1, 1 << 40, math.nan, [1 << 40] * 2):
            attempt(changed(tree, f"augmenters.image.groups.local.{field.name}", value), f"{field.name}={value!r}")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("heads.cross.num_heads", -1, "heads.cross.num_heads: expected greater than or equal to 1, got -1"),
        (
            "augmenters.image.local_crops_size",
            1,
            "model.image: the views 'local' of augmenters.image are 1 pixels wide, less than a patch",
        ),
        ("augmenters.image.global_crops_size", 7, "mask_probability: the image tower has no patches to mask"),
        ("augmenters.image.global_crops_number", 1024, None),
        (
            "augmenters.image.global_crops_size",
            8192,
            "augmenters.image: 134,217,984 pixels of views a sample, at most 67,108,864",
        ),
        ("augmenters.image.gaussian_blur_radius", [1, 1e6], "is not a range of radii from 0.01 to 100"),
        ("augmenters.image.mask_aspect", [1e-9, 1], "is not a range of aspect ratios from 0.001 to 1000"),
        ("model.image.mlp_ratio", 0.001, "mlp_ratio: 0.001 leaves the MLP no width"),
        ("model.image.width", 1 << 16, None),
        ("model.text.vocab_size", 100, "model.text.vocab_size: 100 is less than the tokenizer's 49408"),
        ("heads.dino.output_dim", 10**9, None),
        ("heads.dino.output_dim", 10**9 + 1, "heads.dino.output_dim: expected less than or equal to 1000000000"),
        (
            "training.micro_batch_size",
            4,
            "training.micro_batch_size: exact accumulation is impossible here: heads.project mixes samples",
        ),
        ("evaluators.retrieval.texts", "", "evaluators.retrieval.texts: an empty name"),
        ("evaluators.classification.label", "", "evaluators.classification.label: an empty name"),
        ("losses.siglip.init_logit_bias", 1e9, "init_logit_bias: 1e+09 is outside -1000..1000"),
        ("optimizer.beta2", 1, "optimizer.beta2: expected less than 1, got 1"),
        ("optimizer.eps", math.nan, "optimizer.eps: expected a finite number, got .nan"),
        ("schedule.epoch", 3, "schedule.epoch: unknown option of Cosine (cosmos-ssl 0.1.0). Did you mean 'epochs'?"),
        ("schedule.over_steps", 0, "schedule.over_steps: expected greater than or equal to 1, got 0"),
        (
            "optimizer",
            {"type": "timm", "name": "lino"},
            "optimizer.name: timm has no optimiser 'lino'. Did you mean 'lion'",
        ),
        ("optimizer", {"type": "torch", "name": "Muon"}, "optimizer: Muon cannot be used so: Muon only supports 2D"),
        (
            "teacher.momentum_teacher",
            {"type": "linear", "start": 0.1, "end": 2},
            "teacher.momentum_teacher.end: expected less than or equal to 1, got 2",
        ),
        (
            "teacher.momentum_teacher",
            {"type": "linar", "start": 0.1, "end": 1.0},
            "no schedule named 'linar'. Did you mean",
        ),
        (
            "teacher.momentum_teacher",
            {"type": "linear", "start": 0.1, "end": 1.0, "over_epoch": 1},
            "momentum_teacher.over_epoch: unknown option of Linear (cosmos-ssl 0.1.0). Did you mean 'over_epochs'?",
        ),
        (
            "teacher.momentum_teacher",
            {"type": "linear", "start": 0.1, "end": 1.0, "over_steps": 1, "over_epochs": 1},
            "teacher.momentum_teacher.over_epochs: over_steps says the length already",
        ),
        ("data.seed", -1, "data.seed: -1 is below zero"),
        ("data.image_size", 1 << 20, "data.image_size: 1048576 is not among 16 to 4096"),
    ],
)
def test_what_would_fail_later_is_found(
    trees: dict[str, dict[str, Any]], path: str, value: Any, words: str | None
) -> None:
    loaded = load_config(changed(trees[""], path, value))
    if words is None:
        check(loaded)
        return
    with pytest.raises(UserError) as caught:
        check(loaded)
    assert words in str(caught.value)


def test_heads_have_samples_to_mix(trees: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(
        UserError, match=r"heads\.project: mixes samples, and training\.batch_size is 1\. Take at least 2"
    ):
        check(load_config(changed(without(trees[""], "koleo"), "training.batch_size", 1)))


def test_a_model_that_no_machine_holds(trees: dict[str, dict[str, Any]]) -> None:
    wide = changed(changed(trees[""], "model.image.width", 1 << 16), "model.image.layers", 8)
    with pytest.raises(UserError, match=r"model\.image: 41\d,\d+,\d+,\d+ parameters, at most 100,000,000,000 can be"):
        check(load_config(wide))


def test_sizes_that_a_tower_of_timm_cannot_take(trees: dict[str, dict[str, Any]]) -> None:
    tree = trees["model.image"]
    for size, words in ((24, "24 pixels wide: timm's 'test_vit' takes multiples of 16"), (8, "takes multiples of 16")):
        with pytest.raises(UserError, match=words):
            check(load_config(changed(tree, "augmenters.image.local_crops_size", size)))
    fixed = changed(tree, "model.image", {"type": "timm", "model": "cait_xxs24_224", "image_size": 32})
    with pytest.raises(
        UserError,
        match=r"the views 'local' of augmenters\.image are 16 pixels wide: timm's 'cait_xxs24_224' takes 32 alone",
    ):
        check(load_config(fixed))


@pytest.mark.slow
def test_all_values_of_all_options_and_pairs_of_them(trees: dict[str, dict[str, Any]]) -> None:
    draw = random.Random(0)
    for place, tree in trees.items():
        options = options_of(tree, "augmenters.image" if place == "crop" else place)
        bad = [(path, value) for path, record, option in options for value in accepted(record, option)]
        for path, value in bad:
            attempt(changed(tree, path, value), f"{path}={value!r}")
        for _ in range(300 if len(bad) > 100 else 0):
            (first, one), (second, other) = draw.sample(bad, 2)
            attempt(changed(changed(tree, first, one), second, other), f"{first}={one!r} {second}={other!r}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in packaged_configs() if name != "base" and "shared" not in name])
def test_options_of_every_recipe(name: str) -> None:
    tree = load_config(name).tree
    for tower in ("image", "text"):
        if "layers" in (tree["model"].get(tower) or {}):
            tree = changed(tree, f"model.{tower}.layers", 1)  # towers are what takes time
    for path, record, option in options_of(tree):
        for value in accepted(record, option, QUICK):
            attempt(changed(tree, path, value), f"{name}: {path}={value!r}")


def _refuse(value: int) -> int:
    raise ValueError("must be odd")


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (Annotated[str, Field(min_length=1)], "", "expected at least 1 character, got ''"),
        (Annotated[str, Field(pattern="^a+$")], "b", "expected a string that matches ^a+$, got 'b'"),
        (Annotated[float, Field(ge=1e-30)], 0, "expected greater than or equal to 1e-30, got 0"),
        (Annotated[int, Field(multiple_of=4)], 3, "expected a multiple of 4, got 3"),
        (frozenset[int] | dict[str, int] | None, "x", "expected a list or a mapping, got 'x'"),
        (Annotated[int, AfterValidator(_refuse)], 2, "expected another value (Value error, must be odd), got 2"),
    ],
)
def test_what_pydantic_expected_in_plain_words(kind: Any, value: Any, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    assert registry.describe_errors(caught.value.errors(), value) == [((), words)]
