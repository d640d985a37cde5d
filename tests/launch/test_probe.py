"""``--probe``: what it says, that its folder goes whatever happens, and that nothing else is touched."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cosmos_ssl import build
from cosmos_ssl.build import readiness
from cosmos_ssl.config import load_config
from cosmos_ssl.engine import probe as engine_probe
from cosmos_ssl.engine.probe import measured
from cosmos_ssl_launch import main, slurm
from cosmos_ssl_launch.slurm import JobState

GIB = 2**30
SMALL = [
    *("data.train_samples=64", "data.validation_samples=16", "training.batch_size=8", "schedule.epochs=10000"),
    *("model.image.layers=1", "model.text.layers=1", "model.text.width=32", "loader.workers=0"),
]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words for a probe of a small run, whose data lie outside of the folder that it is started in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return ["--config", "quickstart", f"data.folder={tmp_path}/scenes", *SMALL]


@pytest.mark.slow
def test_ranks_are_measured_beside_a_run_that_is_not_touched(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "here" / "runs" / "quickstart"
    (run / "checkpoints").mkdir(parents=True)
    (run / "result.json").write_text("finished")
    assert main([*small, "--probe", "4", "profile.nproc=2"]) == 0
    said = capfd.readouterr().out
    assert re.search(r"\nspeed +[\d.]+ samples/s on 2 ranks, [\d.]+ s a step \(steps 2 to 4\)\n", said), said
    hours = re.search(r"\nthe whole run  80,000 steps of 8 samples: ([\d.]+) hours, ([\d.]+) rank-hours, without", said)
    assert hours and float(hours[2]) == pytest.approx(2 * float(hours[1]), abs=0.16)  # both are rounded to 0.1
    assert re.search(r"\nwaits +data wait \d+%\nmemory +0\.\d\d GiB at most", said)
    assert sorted(path.name for path in run.parent.rglob("*")) == ["checkpoints", "quickstart", "result.json"]


def test_its_folder_goes_on_ctrl_c(small: list[str], tmp_path: Path) -> None:
    ended = threading.Event()

    def press() -> None:
        while not list(tmp_path.glob("here/runs/quickstart.probe-*/metrics.jsonl")):
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGINT)

    (thread := threading.Thread(target=press)).start()
    try:
        assert main([*small, "--probe", "100000"]) == 130
    finally:
        ended.set()
        thread.join()
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to be in, outside of any world, with checks that find nothing."""
    monkeypatch.chdir(tmp_path)
    for variable in ("COSMOS_PROFILE", "WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(build, "check", lambda loaded: None)
    monkeypatch.setattr(readiness, "make_ready", lambda loaded, scan=True: None)


@pytest.mark.usefixtures("quiet")
def test_a_world_that_is_started_is_joined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def probe(loaded: Any, steps: int) -> list[tuple[str, str]]:
        loaded.config.folder.mkdir(parents=True)
        return [("probed", f"{steps} steps in {loaded.config.folder}, {len(loaded.config.evaluators)} evaluators")]

    for name, value in (("WORLD_SIZE", "1"), ("RANK", "0"), ("MASTER_PORT", "4321")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "probe", probe)
    assert main(["--config", "quickstart", "--probe", "5"]) == 0
    assert capsys.readouterr().out == "probed  5 steps in runs/quickstart.probe-4321, 0 evaluators\n"
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_job_is_queued_watched_and_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, interrupted: bool
) -> None:
    told: list[Any] = []

    def submit(loaded: Any, profile: Any, *, snapshot: bool, probe: int) -> list[SimpleNamespace]:
        assert loaded[0].config.folder.is_dir() and not loaded[0].config.evaluators
        told.append((profile.restarts_without_progress, snapshot, probe))
        return [SimpleNamespace(job_id="7")]

    def show_log(submission: Any) -> int:
        if interrupted:
            raise KeyboardInterrupt
        return 0

    states = iter(["RUNNING", "CANCELLED"] if interrupted else ["COMPLETED"])
    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "show_log", show_log)
    monkeypatch.setattr(slurm, "job_state", lambda job_id: JobState(next(states)))
    monkeypatch.setattr(slurm, "cancel", lambda job_id: told.append(("cancelled", job_id)))
    code = main(["--config", "quickstart", "--probe", "5", "--profile", "slurm_4x4", "--no-snapshot"])
    assert code == (130 if interrupted else 0)
    assert told == [(0, False, 5), *([("cancelled", "7")] if interrupted else [])]
    assert "probing 5 steps as job 7, on 4 x 4 ranks" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("words", [["1"], ["4", "--dry-run"], ["4", "--fork", "runs/a"]])
def test_what_it_does_not_go_with(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "quickstart", "--probe", *words]) == 2
    assert "--probe N measures N steps, 2 or more, of one config" in capsys.readouterr().err


def test_what_is_said_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 ranks of 64 samples; the first 5 steps are left out, but for memory."""
    config = load_config("cosmos/vitb16_cc3m").config
    row = {"step": 5, "samples_per_second": 1.0, "data_wait": 1.0, "gpu_wait": 1.0, "memory": 41.0, "mfu": 0.1}
    later = {"samples_per_second": 1024.0, "data_wait": 0.02, "gpu_wait": 0.03, "memory": 40.0, "mfu": 0.4}
    rows = [row, later | {"step": 10}, later | {"step": 20, "samples_per_second": 4096.0, "data_wait": 0.08}]
    trainer: Any = SimpleNamespace(
        world=SimpleNamespace(first=True, size=16),
        device=torch.device("cuda"),
        order=SimpleNamespace(steps_per_epoch=100),
        run=SimpleNamespace(state=None),
    )
    monkeypatch.setattr(engine_probe, "peak_and_room", lambda device: (GIB, 90 * GIB))
    monkeypatch.setattr(engine_probe, "owners", lambda state: {"parameters": 9 * GIB, "gradients": 3 * GIB})
    hours = 32 * 100 * 1024 / 2048 / 3600
    assert dict(measured(config, trainer, rows)) == {
        "speed": "2,048.0 samples/s on 16 ranks, 0.500 s a step (steps 6 to 20)",
        "mfu": "40%",
        "waits": "data wait 4%, gpu wait 3%",
        "memory": "41.0 of 90.0 GiB at most, with 64 samples a rank at once; about 144 would fit "
        "(training.micro_batch_size, or batch_size over ranks)",
        "the whole run": f"3,200 steps of 1,024 samples: {hours:.4f} hours, {16 * hours:.4f} GPU-hours, without "
        "evaluations and checkpoints",
    }
    trainer.world.first = False
    assert not measured(config, trainer, rows)
