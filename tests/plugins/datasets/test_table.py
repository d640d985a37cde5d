"""Tables as training data: how rows are assigned to shards, which captions are read, and whole runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cosmos_ssl
from cosmos_ssl import testing
from cosmos_ssl.api import DataError, Spec, ViewSpec
from cosmos_ssl.errors import ConfigError, TrainingError, UserError
from cosmos_ssl_plugins.datasets.table import Table

PICTURES = Spec(embed_dim=8, image_views={"global": ViewSpec(views=1, size=8)})
BOTH = Spec(embed_dim=8, image_views=PICTURES.image_views, text_views={"global": ViewSpec(views=1)})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def write(path: Path, count: int) -> str:
    """JSON lines beside a folder of pictures."""
    rng = np.random.default_rng(0)
    (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (20, 24, 3)).astype(np.uint8)).save(file, "png")
        (path.parent / "pictures" / f"{n}.png").write_bytes(file.getvalue())
        rows.append({"file": f"{n}.png", "caption": f"picture {n}", "long": [f"number {n}", f"of {count}"]})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_the_part(tmp_path: Path) -> None:
    testing.check_options("datasets", "table")
    name, root = write(tmp_path / "t.jsonl", 130), str(tmp_path / "pictures")
    options: dict[str, Any] = {"train_data": name, "image_column": "file", "image_root": root}
    data = Table(BOTH, **options, caption_columns=["caption", "long"], validation_data=f"{tmp_path}/v.jsonl")
    data.prepare()
    assert data.shard_sizes.tolist() == [44, 43, 43]
    assert sorted(data.read(i).key for i in range(130)) == sorted(f"{n}.png" for n in range(130))
    assert [data.read(i).key for i in (0, 1, 43)] == ["0.png", "3.png", "129.png"], "every third file of the list"
    assert data.read(1).captions == {"caption": ["picture 3"], "long": ["number 3", "of 130"]}
    assert (
        data.validation_data == f"{tmp_path}/v.jsonl#image_column=file&caption_columns=caption,long&image_root={root}"
    )
    alone = Table(PICTURES, **options)
    alone.prepare()
    assert alone.read(0).captions == {} and alone.identity()["digest"] != data.identity()["digest"]
    found = Table(BOTH, **options)
    found.prepare()
    assert found.read(0).captions == {"caption": ["picture 0"]}, "told by its name"
    assert Table(BOTH, **options, validation_data="a.tar").validation_data == "a.tar"
    with pytest.raises(ValueError, match=r"^caption_columns: an empty list"):
        Table(BOTH, **options, caption_columns=[])
    with pytest.raises(DataError, match=r"no column 'files'. Did you mean 'file'\?"):
        Table(BOTH, **options | {"image_column": "files"}).check_exists()


def config(folder: Path) -> dict[str, Any]:
    columns = {"image_column": "file", "caption_columns": ["caption"], "image_root": str(folder / "pictures")}
    return {
        "extends": "base.yaml",
        "name": "tables",
        "output_dir": str(folder / "run"),
        "model": {
            "embed_dim": 16,
            "image": {"type": "clip_vit", "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 16},
            "text": {"type": "clip_text", "width": 32, "layers": 1, "heads": 2},
        },
        "tokenizer": {"type": "clip", "context_length": 16},
        "augmenters": {"image": {"type": "resize_crop", "size": 16}, "text": {"type": "text_crop"}},
        "losses": {"clip": {"type": "clip"}},
        "data": {"type": "table", "train_data": f"{folder}/t.jsonl", "validation_data": f"{folder}/t.jsonl", **columns},
        "loader": {"workers": 0},
        "schedule": {"max_steps": 6, "warmup_steps": 1},
        "training": {"batch_size": 8, "precision": "fp32"},
        "evaluators": {"retrieval": {"type": "retrieval"}},
        "checkpoints": {"every_steps": 3},
        "logging": {"every_steps": 1, "tensorboard": False},
    }


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_runs_go_on_exactly_and_know_their_data(tmp_path: Path) -> None:
    """One whole run with workers, one in two parts without: the same losses, with a missing picture replaced."""
    write(tmp_path / "t.jsonl", 36)
    (tmp_path / "pictures" / "7.png").unlink()
    whole = [f"output_dir={tmp_path}/whole", "loader.workers=2", "loader.error_budget=0.5"]
    found = cosmos_ssl.train(config(tmp_path), whole)
    assert 0 <= found["retrieval/student/image_to_text_R@1"] <= 1
    mine = ["loader.error_budget=0.5"]
    cut = config(tmp_path) | {"callbacks": {"stop": {"type": StopAtFour}}}
    with pytest.raises(TrainingError, match="stopped"):
        cosmos_ssl.train(cut, mine)
    StopAtFour.armed = False
    cosmos_ssl.train(cut, mine)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    with pytest.raises(TrainingError, match=r"missing picture \d.*worst shard t.jsonl"):
        cosmos_ssl.train(config(tmp_path), ["loader.error_budget=0", f"output_dir={tmp_path}/strict"])
    write(tmp_path / "t.jsonl", 36)
    with pytest.raises(UserError, match=r"another data set \(data, content: "):
        cosmos_ssl.train(config(tmp_path), [f"output_dir={tmp_path}/whole", *mine])
    with pytest.raises(ConfigError, match=r"evaluators.retrieval.data: .*nothing.csv does not exist"):
        cosmos_ssl.train(config(tmp_path), [f"evaluators.retrieval.data={tmp_path}/nothing.csv"])


class StopAtFour(cosmos_ssl.api.Callback):
    """Ends the run before its fifth step, once."""

    armed = True
    watches = True

    def __init__(self, spec: Spec) -> None:
        pass

    def before_step(self, ctx: Any) -> None:
        if StopAtFour.armed and ctx.progress.step == 4:
            raise TrainingError("stopped")
