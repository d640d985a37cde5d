"""Built-in writers: what stands where they write, each number once, though a run was cut off."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl.api import RunInfo
from cosmos_ssl.testing import check_writer, example_spec
from cosmos_ssl_plugins.writers import package
from cosmos_ssl_plugins.writers.files import Csv, JsonLines, Png

Rows = Iterator[tuple[int, str, float]]


def of_csv(folder: Path) -> Rows:
    with (folder / "metrics.csv").open() as file:
        yield from ((int(r["step"]), r["name"], float(r["value"] or "nan")) for r in csv.DictReader(file))


def of_rows(folder: Path) -> Rows:
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield from ((row["step"], n, float("nan") if v is None else v) for n, v in row.items() if n != "step")


def of_events(folder: Path) -> Rows:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in events.Images("eval/student/grid")] == [1, 2, 3, 4]
    for name in ("loss", "loss/part"):
        yield from ((e.step, name, e.value if name == "loss" else 1 / e.step) for e in events.Scalars(name))


@pytest.mark.parametrize(("name", "read"), [("csv", of_csv), ("json_lines", of_rows), ("tensorboard", of_events)])
def test_each_number_stands_there_once(name: str, read: Any, tmp_path: Path) -> None:
    check_writer(name, folder=tmp_path, read=read)


def test_pictures_are_png_files(tmp_path: Path) -> None:
    check_writer("png", folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"step_{n:08d}" for n in (1, 2, 3, 4)]
    picture = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    writer = Png(example_spec())
    writer.start(RunInfo(folder=tmp_path, name="x", id="0", step=0))
    writer.pictures(7, {"retrieval/student/grid": picture})
    found = Image.open(tmp_path / "pictures/step_00000007/retrieval-student-grid.png")
    assert np.array_equal(np.array(found), picture.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("file", ["log.txt", "a/b.csv", "/x.csv", "", ".."])
def test_a_file_lies_in_the_run_folder_and_is_not_its_own(file: str) -> None:
    with pytest.raises(ValueError, match=r"^file: "):
        Csv(example_spec(), file=file)
    with pytest.raises(ValueError, match=r"^file: "):
        JsonLines(example_spec(), file="metrics.jsonl")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_told_with_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(package, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"needs {name}, which is not installed. Run: pip install {name}"):
        check_writer(name, folder=tmp_path)


def test_wandb_leaves_a_run_of_one_id_for_each_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    check_writer("wandb", folder=tmp_path, mode="offline", project="p")
    assert len({path.parent for path in tmp_path.rglob("run-0123456789abcdef.wandb")}) in (1, 2)


def test_mlflow_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def read(folder: Path) -> Rows:
        client = mlflow.MlflowClient((folder / "mlruns").as_uri())
        [run] = client.search_runs([client.get_experiment_by_name("cosmos-ssl").experiment_id])
        assert run.info.status == "FINISHED" and run.data.tags["cosmos_ssl.run"] == "0123456789abcdef"
        for name in ("loss", "loss/part"):
            yield from (
                (m.step, name, m.value) for m in client.get_metric_history(run.info.run_id, name.replace("/", "."))
            )

    check_writer("mlflow", folder=tmp_path, read=read)


def test_trackio_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    (tmp_path / "run").mkdir()
    for module in (utils, __import__("trackio.sqlite_storage", fromlist=["x"])):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    check_writer("trackio", folder=tmp_path / "run", project="p")
    [name] = SQLiteStorage.get_runs("p")
    logs = SQLiteStorage.get_logs("p", name)
    assert name == "check-0123456789abcdef" and [row["step"] for row in logs if "loss" in row] == [1, 2, 3, 4]
