"""Built-in writers: what stands where they write, each number once, though a run was cut off."""

from __future__ import annotations

import csv
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl.api import RunInfo
from cosmos_ssl.engine.metrics import Writers
from cosmos_ssl.testing import check_writer, example_spec
from cosmos_ssl_plugins.writers import package
from cosmos_ssl_plugins.writers.files import Csv, JsonLines, Png
from cosmos_ssl_plugins.writers.mlflow import Mlflow
from cosmos_ssl_plugins.writers.trackio import Trackio
from cosmos_ssl_plugins.writers.wandb import Wandb

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


Losses = dict[str, list[tuple[int, float]]]


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a file of wandb: LevelDB's log format, behind a header of seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if (left := -at % 32768) and left < 7:  # the end of a block
            at += left
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_losses(folder: Path) -> Losses:
    """Step and loss of each run of wandb, from the files of its offline mode in the order of starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    losses: Losses = {}
    for path in sorted(folder.rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime):
        for content in wandb_records(path.read_bytes()):
            history = Record.FromString(content).history
            row = {item.key or item.nested_key[0]: item.value_json for item in history.item}
            if "loss" in row:
                losses.setdefault(path.stem.removeprefix("run-"), []).append((history.step.num, float(row["loss"])))
    return losses


def mlflow_losses(folder: Path) -> Losses:
    import mlflow

    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    runs = client.search_runs([client.get_experiment_by_name("cosmos-ssl").experiment_id])
    return {
        run.data.tags["cosmos_ssl.run"]: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
        for run in runs
    }


def trackio_losses(folder: Path) -> Losses:
    from trackio.sqlite_storage import SQLiteStorage

    return {
        f"abc{name.partition('abc')[2]}": [
            (row["step"], row["loss"]) for row in SQLiteStorage.get_logs("cosmos-ssl", name)
        ]
        for name in SQLiteStorage.get_runs("cosmos-ssl")
    }


@pytest.mark.parametrize(
    ("writer", "options", "read"),
    [(Wandb, {"mode": "offline"}, wandb_losses), (Mlflow, {}, mlflow_losses), (Trackio, {}, trackio_losses)],
)
def test_replaced_steps_are_another_run(
    writer: Any, options: Any, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes back to step 2, is killed at step 4 of its new segment, and starts again from step 2."""
    name = writer.__name__.lower()
    pytest.importorskip(name)
    for variable in ("WANDB_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if name == "trackio":
        for module in ("utils", "sqlite_storage"):
            monkeypatch.setattr(f"trackio.{module}.TRACKIO_DIR", tmp_path / "trackio")

    def started(step: int, segment: int) -> RunInfo:
        return RunInfo(folder=tmp_path, name="x", id="abc", step=step, segment=segment)

    def write(writers: Writers, steps: range, factor: int) -> None:
        for step in steps:
            writers.scalars(step, {"loss": step * factor})

    def part() -> Any:
        made = writer(example_spec(), **options)
        made.part_name = name
        return made

    writers = Writers([part()], started(0, 1))
    write(writers, range(1, 5), 1)
    writers.restart(started(2, 2), {})
    write(writers, range(3, 5), 10)
    writers.close()
    if name == "wandb":
        time.sleep(1.1)  # it names folders of offline runs by the second of their start
    again = Writers([part()], started(2, 2), {step: frozenset({"loss"}) for step in (3, 4)})
    write(again, range(3, 6), 10)
    again.close()
    losses = read(tmp_path)
    assert losses == {"abc": [(1, 1), (2, 2), (3, 3), (4, 4)], "abc-2": [(3, 30), (4, 40), (5, 50)]}
