"""What a dry run finds before a start, and that it leaves nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import cosmos_ssl
from cosmos_ssl.build import check
from cosmos_ssl.build.readiness import dry_run, make_ready
from cosmos_ssl.config import load_config
from cosmos_ssl.engine.fork import told_fork
from cosmos_ssl.engine.run_folder import RunFolder
from cosmos_ssl.errors import CheckpointError, UserError

TINY: dict[str, Any] = {
    "extends": "quickstart",
    "model": {"image": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 2}, "embed_dim": 32},
    "augmenters": {"text": {"num_sampled_captions": 3}},
    "data": {"train_samples": 16, "validation_samples": 8, "image_size": 32},
    "loader": {"workers": 0},
    "schedule": {"epochs": 1, "warmup_steps": 1},
    "training": {"batch_size": 8},
    "evaluators": {"classification": None},
    "logging": {"every_steps": 1, "tensorboard": False},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scenes' shards and a finished run ``old``."""
    folder = tmp_path_factory.mktemp("start")
    cosmos_ssl.train(TINY, [f"output_dir={folder}/old", f"data.folder={folder}/scenes", "evaluators=null"])
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def left(*overrides: str, here: bool = True, ranks: int = 1, fork: str | None = None) -> str:
    """What a dry run of a run in the folder ``new`` says that it did not look into."""
    data = [] if any(text.startswith("data=") for text in overrides) else ["data.folder=scenes"]
    return dry_run(load_config(TINY, ["output_dir=new", *data, *overrides]), here=here, ranks=ranks, fork=fork)


def test_a_sound_run_passes_and_leaves_nothing_behind(place: Path) -> None:
    before = sorted(place.rglob("*"))
    assert (
        left() == left("model.pretrained=old") == left("teacher={type: frozen, checkpoint: old, which: student}") == ""
    )
    assert left("data.folder=unwritten") == "the data, which are made or found at the start"
    assert left("schedule.epochs=2", fork="old") == left("output_dir=old", "evaluators=null", ranks=2) == ""
    published = left("model.pretrained=cosmos_vitb16_cc3m", "teacher={type: frozen, checkpoint: hf-hub:org/name}")
    assert published.count("which is fetched at the start") == 2
    assert sorted(place.rglob("*")) == before


SHARDS = 'data={type: webdataset, train_data: "scenes/train-{0000..%s}.tar", cache_dir: cache}'


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.pretrained=nowhere.pt"], r"nowhere\.pt"),
        (["model.pretrained=old", "model.image.patch_size=8"], r"model\.pretrained: old does not fit the towers"),
        (["teacher={type: frozen, checkpoint: nowhere}"], "nowhere"),
        (
            ["teacher={type: frozen, checkpoint: old, which: student}", "model.embed_dim=64"],
            "old has embed_dim 32, the student 64",
        ),
        ([SHARDS % "0001"], r"no such shard: scenes/train-0001\.tar \(1 of 2 shards are missing\)"),
        (["data={type: image_folder, train_data: nowhere}"], "data: nowhere does not exist"),
        (
            ["data.folder=unwritten", "evaluators.retrieval.data=nope.tar"],
            r"evaluators\.retrieval\.data: nope\.tar does not exist",
        ),
        (["evaluators.retrieval.data=nope.tar"], r"evaluators\.retrieval\.data: nope\.tar does not exist"),
        (
            ["output_dir=old", "optimizer.lr=1", "evaluators=null"],
            r"belongs to another config \(optimizer\.lr: 0\.001 -> 1\.0\)",
        ),
        (["output_dir=scenes/scenes.json/new"], r"output_dir: .* cannot be written: .*scenes\.json is no folder"),
        (["training.batch_size=32"], r"16 samples do not fill one batch \(training\.batch_size: 32\)"),
        (["training.batch_size=9"], r"training\.batch_size: 9 cannot be shared by 2 ranks"),
        (["training.compile=true"], r"training\.compile: torch cannot compile here"),
        (["loader.workers=1024", "loader.prefetch=64"], "files open|shared memory"),
        (["training.attention=xformers"], "xformers was asked for"),
        (["training.attention=varlen"], "varlen was asked for, but varlen has no operator for the device 'cpu'"),
    ],
)
def test_what_a_start_would_refuse(overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: object, **options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", none)
    with pytest.raises(UserError, match=message):
        left(*overrides, ranks=2)


MASKED = (
    "heads.dino={type: dinov2_projection, hidden_dim: 24, bottleneck_dim: 12, output_dim: 16}",
    "losses.ibot={type: ibot, head: dino}",
    "model.image.mask_token=true",
    "augmenters.image.mask_probability=0.5",
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.rules=[{match: image.blcks.*, lr_scale: 2}]"], r"rules\.0\.match: .* Did you mean 'image\.blocks"),
        (["optimizer.rules=[{match: '*', frozen: true}]"], "optimizer: every parameter is frozen"),
        ([*MASKED, "training.micro_batch_size=2"], "is impossible here: masked patches are read"),
    ],
)
def test_what_a_check_refuses(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(load_config(TINY, [*overrides, "output_dir=new", "data.folder=unwritten"]))


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("nowhere", [], "no run folder with a sound checkpoint"),
        ("old", [], "stands at step 2, and this run would end at 2"),
        ("old", ["output_dir=old", "schedule.epochs=2"], "is the run folder itself"),
        ("old", ["schedule.epochs=2", "model.image.width=128"], "does not fit the model"),
    ],
)
def test_what_a_fork_would_refuse(source: str, overrides: list[str], message: str) -> None:
    with pytest.raises((UserError, CheckpointError), match=message):
        left(*overrides, fork=source)


def test_shards_that_are_not_indexed(tmp_path: Path) -> None:
    """Here they would be indexed at the start, a job is not queued."""
    words = [SHARDS % "0000", "evaluators=null"]
    assert left(*words) == "what the data hold, which are not indexed yet"
    with pytest.raises(UserError, match=r"these shards are not indexed yet\. Run: cosmos-ssl data index"):
        left(*words, here=False)
    assert not Path("cache").exists()


def test_before_ranks_are_started_the_folder_is_told_what_to_go_on_from(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}/new", "data.folder=scenes", "evaluators=null", "schedule.epochs=2"]
    make_ready(load_config(TINY, words), fork="old")
    told = told_fork(RunFolder(tmp_path / "new"))
    assert told is not None and told.parts[-3:] == ("old", "checkpoints", "step_00000002")
    metrics = cosmos_ssl.train(TINY, words)  # as a rank does, which is not told of the source
    assert metrics["epoch"] == 2
    assert cosmos_ssl.train(TINY, words, fork="old") == metrics  # finished
    shutil.rmtree(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"model\.pretrained: old does not fit"):
        make_ready(load_config(TINY, [*words, "model.pretrained=old", "model.text.layers=2"]))
