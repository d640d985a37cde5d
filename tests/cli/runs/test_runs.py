"""``cosmos-ssl runs`` on written folders: states, numbers, what differs, reports, mistakes."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl.cli.runs.reading import Reader
from cosmos_ssl.cli.runs.series import Series, lower_is_better, thinned
from cosmos_ssl.engine.signals import Interrupted

Command = Callable[..., tuple[int, str, str]]
Written = Callable[..., Path]
R1 = "retrieval/teacher/text_to_image_R@1"
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on elsewhere"); file.flush()
print("held", flush=True); sys.stdin.read()
"""


@pytest.fixture
def two(tmp_path: Path, written: Written, made_rows: Callable[..., Any]) -> list[str]:
    """Two runs: the first is better in the loss, the second at retrieval."""
    first, second = made_rows(0, 32), made_rows(1, 48)
    first[15][R1], second[15][R1], first[9]["loss"] = 0.25, 0.75, -1.0
    written(tmp_path / "a", first, result={"step": 32})
    written(tmp_path / "b", second, config={"optimizer": {"lr": 0.5}, "teacher": None})
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_states(tmp_path: Path, written: Written) -> None:
    told = f"the run ended: {Interrupted(signal.SIGTERM)}: saved it"
    folders = {
        "finished": written(tmp_path / "finished", result={"step": 3}),
        "stopped": written(tmp_path / "stopped", result={"step": 3, "stopped": {"early": {}}}),
        "interrupted": written(tmp_path / "interrupted", log=[("INFO", "training"), ("INFO", told)]),
        "failed": written(tmp_path / "failed", log=[("INFO", "the run ended: losses stay non-finite")]),
        "resumed and killed": written(tmp_path / "killed", log=[("INFO", told), ("INFO", "resuming")]),
        "running": written(tmp_path / "running", result={"step": 3}),
    }
    (tmp_path / "queued" / "slurm").mkdir(parents=True)
    (tmp_path / "queued" / "slurm" / "config.yaml").write_text("training: {batch_size: 4}\n")
    folders["queued"] = tmp_path / "queued"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folders["running"] / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        found = {name: Reader().read(path, name) for name, path in folders.items()}
        holder.communicate()
    assert {name: run.state for name, run in found.items()} == {
        name: "interrupted" if name == "resumed and killed" else name for name in folders
    }
    assert found["running"].why == "process 7 on elsewhere"
    assert found["failed"].why == "losses stay non-finite" and "early" in found["stopped"].why
    assert found["resumed and killed"].why.startswith("without a word")
    assert Reader().read(folders["running"], "").state == "finished", "its holder has gone"
    assert found["queued"].batch == 4


def test_numbers_of_a_run(tmp_path: Path, written: Written) -> None:
    """Hours are those of training by each row's own rate, MFU their mean over that time, whatever began the run."""
    rows = [
        {"step": 20, "epoch": 2.0, "samples_per_second": 10.0, "mfu": 0.5, "loss": 3.0},
        {"step": 30, "epoch": 3.0, "samples_per_second": 40.0, "mfu": 0.1, "loss": 1.0},
        {"step": 30, "epoch": 3.0, "x/teacher/mean_rank": 7},
        {"step": 40, "epoch": 4.0, "samples_per_second": 40.0, "mfu": 0.1, "loss": None},
    ]
    folder = written(tmp_path / "a", rows, config={"schedule": {"epochs": 9, "max_steps": 64}})
    (folder / "fork.json").write_text('{"step": 10}')
    run = Reader().read(folder, "a")
    assert (run.step, run.total, run.samples) == (40, 64, 320)
    assert run.hours * 3600 == pytest.approx(10 * 8 / 10 + 2 * 10 * 8 / 40)  # 8 s and twice 2 s
    assert run.rate == pytest.approx(30 * 8 / 12) and run.mfu == pytest.approx((8 * 0.5 + 4 * 0.1) / 12)
    assert run.series["loss"].last() == (30, 1.0), "a null is no value"


def test_broken_rows(tmp_path: Path, written: Written) -> None:
    folder = written(tmp_path / "a", [{"step": 1, "loss": 1.0}])
    path = folder / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 2, "loss": 0.5, "big": 1e999, "huge": ' + b"9" * 400 + b', "on": true}\n{"step": 3, "lo')
    reader = Reader()
    run = reader.read(folder, "a")
    assert run.step == 2 and not run.notes, "half a row is being written"
    assert set(run.series) == {"loss"}, "what is no finite number is no value"
    with path.open("ab") as file:
        file.write(b'ss": 0.25}\nnonsense\n[1]\n{"step": -1}\n{"step": 2, "loss": 9.0}\n' + b"[" * 100_000 + b"\n")
    run = reader.read(folder, "a")
    assert run.notes == ["metrics.jsonl: 4 lines are no rows and are left out"]
    assert list(run.series["loss"].values) == [1.0, 9.0], "a step that comes again counts anew"


def test_damaged_folders_are_told_and_read_on(tmp_path: Path, written: Written, command: Command) -> None:
    folder = written(tmp_path / "a", [{"step": 1, "loss": 1.0}], result={"step": "x"})
    (folder / "identity.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    code, out, err = command("runs", str(folder))
    assert (code, err) == (0, "") and "result.json is damaged" in out and "not valid YAML" in out
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    written(tmp_path / "b", [{"step": 1, "loss": 2.5}])
    code, out, _ = command("runs", str(tmp_path))
    assert code == 0 and "2.5" in out and "a: metrics.jsonl cannot be read: Is a directory" in out, "others are shown"


def test_the_table_and_the_reports(two: list[str], tmp_path: Path, command: Command) -> None:
    code, out, _ = command("runs", *two, "--sort", R1, "--json", str(tmp_path / "j"), "--csv", str(tmp_path / "c"))
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert [line[:2] for line in lines if line[:1] in (["a"], ["b"])] == [
        ["b", "interrupted"],
        ["a", "finished"],
        ["b", "0.5"],
        ["a", "0.1"],
    ]
    assert any(line[:5] == ["b", "interrupted", "48", "of", "64"] for line in lines)
    best, other = json.loads((tmp_path / "j").read_text())
    assert best["name"] == "b" and best["metrics"][R1]["best"] == 0.75 and best["metrics"][R1]["best_step"] == 16
    assert best["metrics"]["loss"]["best"] < best["metrics"]["loss"]["last"]
    assert best["config"] == {"optimizer.lr": 0.5, "teacher": None} and other["config"]["teacher"] == "not given"
    rows = list(csv.DictReader((tmp_path / "c").open()))
    assert [row["name"] for row in rows] == ["b", "a"] and rows[1]["config optimizer.lr"] == "0.1"
    assert float(rows[0][f"{R1} best"]) == 0.75 and rows[0]["mfu"] == ""
    for key, first in (("loss", "a"), ("samples", "b"), ("name", "a")):
        assert json.loads(command("runs", *two, "--sort", key, "--json", "-")[1])[0]["name"] == first, key
        assert json.loads(command("runs", *two, "--sort", key, "--reverse", "--json", "-")[1])[1]["name"] == first
    assert list(json.loads(command("runs", *two, "--metrics", "lo*", "--json", "-")[1])[0]["metrics"]) == ["loss"]


def test_which_folders(two: list[str], tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = command("runs", str(tmp_path), two[0], str(tmp_path / "file"), "--json", "-")
    assert (code, [one["name"] for one in json.loads(out)]) == (0, ["a", "b"])
    assert err == f"{tmp_path / 'file'} is no run folder and is left out\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("missing",), "missing is not there"),
        (("file",), "file: no run folder, for there is no config.yaml"),
        (("a", "--sort", "retrieval/teacher/text_to_image_R@"), f"Near: {R1}"),
        (("a", "--metrics", "nothing*"), "--metrics nothing*: no run has such a metric. There are: loss"),
        (("a", "--html", "none/x.html"), "--html none/x.html: the folder"),
        (("a", "--json", "-", "--csv", "-"), "cannot both go to standard output"),
        (("a", "--json", "-", "--watch"), "--watch renews files"),
    ],
)
def test_mistakes(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, argv: tuple[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    code, _, err = command("runs", *argv)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_watching_ends_with_the_last_run(
    tmp_path: Path, written: Written, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "config.yaml").write_text("name: a\n")
    seen = []

    def pass_time(seconds: float) -> None:
        seen.append((seconds, 'http-equiv="refresh" content="3"' in (tmp_path / "x.html").read_text()))
        (tmp_path / "run").rename(tmp_path / f"old{len(seen)}")
        written(tmp_path / "run", [{"step": 5, "loss": 1.0}], result={"step": 5})

    monkeypatch.setattr(time, "sleep", pass_time)
    code, out, _ = command("runs", str(tmp_path / "run"), "--watch", "3", "--html", str(tmp_path / "x.html"))
    assert (code, seen) == (0, [(3.0, True)])
    assert 'http-equiv="refresh"' not in (tmp_path / "x.html").read_text(), "nothing is to come"
    assert out.index("queued") < out.index("finished")


def test_only_what_has_changed_is_read_again(two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    before = reader.read(Path(two[0]), "a").series
    assert reader.read(Path(two[0]), "a").series is before
    with (Path(two[0]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 1.0}\n')
    assert reader.read(Path(two[0]), "a").series["loss"].last() == (99, 1.0)


def test_it_answers_without_torch(two: list[str]) -> None:
    code = "import sys; from cosmos_ssl.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "runs", *two, "--html", f"{two[0]}/page.html"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "False"


def test_flops_come_from_the_config(tmp_path: Path, written: Written, command: Command) -> None:
    """Those of a real config are counted; of one that no model can be built from they stay unknown."""
    from cosmos_ssl.config import load_config

    tree = load_config("quickstart.yaml", []).config.model_dump()
    written(tmp_path / "real", config=tree)
    written(tmp_path / "other")
    found = json.loads(command("runs", str(tmp_path), "--flops", "--json", "-")[1])
    known = {one["name"]: one["flops_per_sample"] for one in found}
    _, _, _ = command("flops", "quickstart.yaml", "--json", str(tmp_path / "flops.json"))
    assert known["real"] == json.loads((tmp_path / "flops.json").read_text())["configs"][0]["flops"]["total"]
    assert known["other"] is None


def test_directions() -> None:
    lower = ("loss", "loss/clip", "retrieval/teacher/image_to_text_mean_rank", "data_wait", "skipped_steps")
    higher = (R1, "classification/student/top1", "samples_per_second", "mfu", "spread/image")
    assert all(map(lower_is_better, lower)) and not any(map(lower_is_better, higher))


@pytest.mark.parametrize("count", [1, 7, 20, 21, 999, 1000])
def test_thinned_curves_keep_ends_and_extremes(count: int) -> None:
    series = Series()
    for step in range(count):
        series.add(3 * step, float((step * 7919) % 1013))
    curve = thinned(series, 10)
    assert len(curve.steps) <= 22 and len(set(curve.steps)) == len(curve.steps)
    assert list(curve.steps) == sorted(curve.steps) and (curve.steps[0], curve.steps[-1]) == (0, 3 * (count - 1))
    assert (curve.values.min(), curve.values.max()) == (min(series.values), max(series.values))
    assert [series.values[step // 3] for step in curve.steps] == list(curve.values)
    if curve.means is not None:
        assert len(curve.means) == 10 and abs(curve.means.mean() - sum(series.values) / count) < 20
