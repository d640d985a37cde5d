"""What makes a run this run: options by their types, contents of the places that they name, and old identities."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.identity import Identity, fingerprint

BASE = {
    "name": "base",
    "model": {"embed_dim": 64, "image": {"type": "clip_vit", "width": 128}, "text": {"type": "clip_text", "width": 64}},
    "tokenizer": {"type": "clip"},
    "augmenters": {"image": {"type": "multi_crop", "global_crops_scale": [0.4, 1.0]}, "text": {"type": "text_crop"}},
    "heads": {"cross": {"type": "cross_attention", "num_heads": 8}},
    "losses": {
        "clip": {"type": "clip", "loss_weight": 0.5},
        "distill": {"type": "cross_modality_distillation", "head": "cross"},
    },
    "teacher": {"type": "ema", "momentum_teacher": 0.99},
    "data": {"type": "webdataset", "train_data": "a/{0000..0003}.tar", "caption_schema": "json:long/cap"},
    "training": {"batch_size": 96},
    "evaluators": {"retrieval": {"type": "retrieval", "data": "b.tar", "every_epochs": 1}},
}
SAME = [
    *("name=b", "output_dir=/y", "evaluators=null", "checkpoints.every_steps=3", "logging.every_steps=1", "profile=p"),
    *("loader.workers=1", "loader.prefetch=9", "loader.error_budget=0.5", "loader.lanes=96"),
    *(
        "training.micro_batch_size=8",
        "training.attention=sdpa",
        "training.kernels=plain",
        "training.compile=true",
        "training.deterministic=true",
    ),
    *("training.device=cpu", "training.trace_steps=3"),
    *("data.train_data=/moved/{0..3}.tar", "data.validation_data=v.tar", "data.cache_dir=c", "data.cache_gib=3"),
]
OTHER = [
    *(
        "model.image.width=64",
        "training.batch_size=48",
        "training.seed=1",
        "training.precision=fp32",
        "loader.lanes=48",
    ),
    *(
        "schedule.epochs=3",
        "optimizer.lr=1",
        "heads.cross.num_heads=4",
        "losses.clip.loss_weight=2",
        "data.caption_schema=txt",
    ),
    *(
        "teacher.update_when=before_optimizer_step",
        "augmenters.image.flip_prob=0",
        "loader.shuffle_samples=3",
        "model.pretrained=a.pt",
    ),
    "data.caption_schema=json:shrt/cap",
]


def identity(*overrides: str, base: dict = BASE) -> Identity:
    """The identity of a run that ``base`` and the overrides make."""
    loaded = load_config(base, overrides)
    return Identity.of(loaded.config, {"samples": 4}, Builder(loaded).places())


@pytest.mark.parametrize("override", SAME)
def test_identity_does_not_change_with(override: str) -> None:
    a, b = identity(), identity(override)
    assert a.digest() == b.digest() and not b.config_changes(a)


@pytest.mark.parametrize("override", OTHER)
def test_identity_changes_with(override: str) -> None:
    a, b = identity(), identity(override)
    assert a.digest() != b.digest() and b.config_changes(a)


def test_differences_are_named() -> None:
    given = (
        "losses.distill=null",
        "model.image.width=384",
        "heads.cross.mask_padding=true",
        "model.pretrained=/a/b.pt",
    )
    assert identity(*given).config_changes(identity()) == [
        "model.image.width: 128 -> 384",
        "model.pretrained: null -> 'b.pt'",
        "losses.distill.type: 'cross_modality_distillation' -> not given",
        "losses.distill.loss_weight: 1.0 -> not given",
        "losses.distill.head: 'cross' -> not given",
        "heads.cross.mask_padding: not given -> true",
    ]


def test_a_tree_of_an_older_version_counts_with_the_defaults() -> None:
    now = identity()
    older = {key: value for key, value in now.config.items() if key not in ("schedule", "optimizer")}
    assert not now.config_changes(Identity(config=older, data={}))


def test_names_of_rules_do_not_count() -> None:
    listed = identity("optimizer.rules=[{match: 'image.*', lr_scale: 2}, {match: 'text.*', frozen: true}]")
    named = identity("optimizer.rules={a: {match: 'image.*', lr_scale: 2}, b: {match: 'text.*', frozen: true}}")
    turned = identity("optimizer.rules={b: {match: 'text.*', frozen: true}, a: {match: 'image.*', lr_scale: 2}}")
    assert not named.config_changes(listed) and turned.config_changes(listed)


# ---------------------------------------------------------------------------- places

OUTSIDE = """\
from cosmos_ssl.api import Aside, Dataset, Location

class Old(Dataset):
    def __init__(self, spec, *, root: str, name: str = "org/a", parts: list[str] = []): ...
    def prepare(self): ...
    def read(self, index): ...
    shard_sizes = ()

class New(Old):
    def __init__(self, spec, *, home: Location = "", root: str = "", threads: Aside[int | None] = None): ...
"""


@pytest.mark.parametrize(
    ("part", "before", "now", "same"),
    [
        ("old", "root=x/a", "root=y/a", True),  # of a data set that declares nothing, names of paths are paths
        ("old", "name=org/a", "name=org/b", False),
        ("old", "parts=[x/y, b]", "parts=[x/y, c]", False),
        ("old", "parts=[a.tar]", "parts=[b.tar]", False),
        ("new", "home=x", "home=y", True),
        ("new", "threads=", "threads=3", True),
        ("new", "root=x", "root=y", False),  # one that declares some is taken at its word
    ],
)
def test_paths_are_told_by_type(install: Callable[..., Path], part: str, before: str, now: str, same: bool) -> None:
    install(
        "outside",
        entries={"datasets/old": "outside_data:Old", "datasets/new": "outside_data:New"},
        modules={"outside_data": OUTSIDE},
    )
    base = {**BASE, "data": {"type": part, **({"root": "r"} if part == "old" else {})}}
    a, b = (identity(f"data.{given}", base=base) for given in (before, now))
    assert (a.digest() == b.digest()) is same and bool(b.config_changes(a)) is not same


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 40 MB, of which a part is read, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = Path("weights.pt")
    path.write_bytes(bytes(range(250)) * 160_000)
    return path


def test_another_file_of_the_same_name_is_another_run(weights: Path, tmp_path: Path) -> None:
    """``model.pretrained`` and the frozen teacher's checkpoint: what lies there counts, not where."""
    teacher = {**BASE, "teacher": {"type": "frozen", "checkpoint": str(weights)}}
    before = identity(f"model.pretrained={weights}", base=teacher)
    moved = tmp_path / "else" / "renamed.pt"
    moved.parent.mkdir()
    shutil.copy(weights, moved)
    after_move = identity(f"model.pretrained={moved}", f"teacher.checkpoint={moved}", base=teacher)
    assert after_move.digest() == before.digest() and not after_move.config_changes(before)
    with weights.open("r+b") as file:
        file.seek(20_000_000)
        file.write(b"other" * 100_000)
    assert identity(f"model.pretrained={weights}", base=teacher).config_changes(before) == [
        "model.pretrained: 'weights.pt' holds something else now",
        "teacher.checkpoint: 'weights.pt' holds something else now",
    ]


def test_an_identity_without_contents_goes_by_names(weights: Path) -> None:
    """Identities of before: the name of ``model.pretrained``, the value of all else, paths of data left out."""
    now = identity(f"model.pretrained={weights}")
    older = Identity(config=copy.deepcopy(now.config), data={})
    older.config["model"]["pretrained"] = "/far/weights.pt"
    older.config["data"].update(train_data="elsewhere.tar", cache_dir="c")
    assert not now.config_changes(older)
    older.config["model"]["pretrained"] = "/far/other.pt"
    assert now.config_changes(older) == ["model.pretrained: 'other.pt' -> 'weights.pt'"]


def test_what_lies_at_a_place(tmp_path: Path) -> None:
    """A run folder is its newest checkpoint, a folder its files, a name that means no file here itself."""
    run = tmp_path / "run"
    for step in (99_999_999, 100_000_000):
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
        (run / "checkpoints" / f"step_{step}" / "manifest.json").write_text(json.dumps({"step": step}))
    newest = fingerprint(str(run))
    assert (
        newest
        == fingerprint(str(run / "checkpoints" / "step_100000000"))
        != fingerprint(str(run / "checkpoints" / "step_99999999"))
    )
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "hub" / ".cache").write_text("x")
    found = fingerprint(str(tmp_path / "hub"))
    (tmp_path / "hub" / ".cache").write_text("y")
    assert fingerprint(str((tmp_path / "hub").rename(tmp_path / "moved"))) == found
    (tmp_path / "moved" / "config.json").write_text("[]")
    assert fingerprint(str(tmp_path / "moved")) not in (found, newest)
    assert fingerprint("hf-hub:org/name") == "hf-hub:org/name"
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"])


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "small"
    content = bytearray(3 * 65_536 + 17)
    path.write_bytes(content)
    found = {fingerprint(str(path))}
    for place in (0, 65_535, 65_536, 70_000, 131_072, 150_000, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        found.add(fingerprint(str(path)))
    assert len(found) == 8


# ---------------------------------------------------------------------------- data


def test_what_is_known_of_the_data_at_one_time_alone_is_no_difference() -> None:
    def of(**data: object) -> Identity:
        return Identity(config={}, data=data)

    before = of(samples=4, shards={"count": 2, "digest": "a"}, full="x")
    now = of(samples=4, shards={"count": 2, "digest": "a", "content": "b"})
    assert not now.data_changes(before)
    assert now.knowing(before).data == {
        "samples": 4,
        "shards": {"count": 2, "digest": "a", "content": "b"},
        "full": "x",
    }
    assert of(shards={"content": "c"}, full="y").data_changes(now.knowing(before)) == [
        "data, shards.content: 'b' -> 'c'",
        "data, full: 'x' -> 'y'",
    ]
