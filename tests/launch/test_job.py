"""A rank of a job, with stand-ins for SLURM and for training: exit codes, who requeues, what is noted."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosmos_ssl import build
from cosmos_ssl.config import LoadedConfig, load_config
from cosmos_ssl.errors import CosmosError, StorageError, TrainingError
from cosmos_ssl_launch import job as job_module
from cosmos_ssl_launch.job import SlurmRank, is_requeued_by_slurm
from cosmos_ssl_launch.requeue import ENDED, STARTS

submitit = pytest.importorskip("submitit")
OURS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
JOB = "JobState=RUNNING Partition=low PreemptTime={time}"
ANSWERS = {
    "config": "PreemptType             = preempt/{kind}\nPreemptMode = REQUEUE\n",
    "partition": "PartitionName=low PreemptMode={mode}",
}


class Left(CosmosError):
    """Stands for Interrupted."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call a job as one rank; ``train`` gets ``leaving``. Its exit code or metrics."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "MASTER_ADDR",
        "MASTER_PORT",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GOMP_SPINCOUNT",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.setenv(name, "")  # so that they are put back
        monkeypatch.delenv(name)
    place = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NODELIST": "no-such-host[1-2]",
    }
    for name, value in (place | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SUBMITIT_EXECUTOR": "slurm"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "check", lambda loaded: None)
    monkeypatch.setattr(job_module, "GRACE", 0.0)
    monkeypatch.setattr(job_module, "is_requeued_by_slurm", lambda job_id: False)
    requeued: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}

    def submitits(number: int, frame: object) -> None:
        requeued.append(number)
        sys.exit(-1)

    def start(rank: int, train: Callable[..., dict[str, float]], handler: Any = submitits) -> Any:
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        signal.signal(signal.SIGUSR2, handler)
        monkeypatch.setattr(build, "run", lambda loaded, leaving: train(leaving))
        try:
            return SlurmRank(load_config("quickstart", ["output_dir=run"]).tree, 1)()
        except SystemExit as left:
            return left.code

    yield SimpleNamespace(rank=start, requeued=requeued, run=tmp_path / "run")
    for number, handler in before.items():
        signal.signal(number, handler)


def ended_by(number: int) -> Callable[[Callable[[int], int]], dict[str, float]]:
    def train(leaving: Callable[[int], int]) -> dict[str, float]:
        error = Left("saved")
        error.exit_code = leaving(number)
        raise error

    return train


def failing(error: Exception) -> Callable[[Any], dict[str, float]]:
    def train(leaving: Any) -> dict[str, float]:
        raise error

    return train


def test_the_place_of_a_rank(start: Any) -> None:
    """A host whose name means nothing is reached by its address; devices are left as SLURM gave them; a restart meets
    elsewhere.
    """
    assert start.rank(3, lambda leaving: {"loss": 1.0}) == {"loss": 1.0}
    found = {name: os.environ[name] for name in ("MASTER_ADDR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    assert found == {
        "MASTER_ADDR": "10.0.0.1",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert "CUDA_VISIBLE_DEVICES" not in os.environ and 20_000 <= int(os.environ["MASTER_PORT"]) <= 60_000
    assert not start.run.exists()


def test_a_signal_to_save_and_leave(start: Any) -> None:
    assert start.rank(0, ended_by(signal.SIGTERM)) == 75
    assert start.rank(1, ended_by(signal.SIGTERM)) == 0  # srun would end the first rank before it has saved
    assert start.requeued == []


def test_a_signal_to_save_and_requeue(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start.rank(1, ended_by(signal.SIGUSR2)) == 0 and start.requeued == []
    assert start.rank(0, ended_by(signal.SIGUSR2)) == 75 and start.requeued == [signal.SIGUSR2]
    monkeypatch.setattr(job_module, "is_requeued_by_slurm", lambda job_id: job_id == "7")
    assert start.rank(0, ended_by(signal.SIGUSR2)) == 75 and start.requeued == [signal.SIGUSR2]


def test_a_job_that_cannot_be_requeued(start: Any) -> None:
    def no_progress(number: int, frame: object) -> None:
        raise submitit.core.utils.UncompletedJobError("Job not requeued because: checkpoint function returned None.")

    def no_controller(number: int, frame: object) -> None:
        raise OSError("no scontrol")

    assert start.rank(0, ended_by(signal.SIGUSR2), no_controller) == 74  # the batch script tries again
    assert (start.run / ENDED).read_text() == "74 not requeued\n"
    (start.run / ENDED).unlink()
    assert start.rank(0, ended_by(signal.SIGUSR2), no_progress) == 1
    assert (start.run / ENDED).read_text() == "1 not requeued\n"


def test_what_srun_sends_to_the_others_changes_no_exit_code(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "time.sleep", lambda seconds: signal.raise_signal(signal.SIGTERM)
    )  # the grace of a rank that has lost another
    assert start.rank(0, failing(StorageError("another rank was lost"))) == 74
    assert not (start.run / ENDED).exists()


@pytest.mark.parametrize(("error", "code"), [(TrainingError("no"), 1), (StorageError("gone"), 74)])
def test_exit_codes(start: Any, error: Exception, code: int) -> None:
    assert start.rank(0, failing(error)) == code
    assert (start.run / ENDED).exists() == (code == 1)
    assert (start.run / STARTS).read_text() == "none\n"


def test_an_unforeseen_error_is_submitits_to_show(start: Any) -> None:
    start.rank(0, lambda leaving: {"loss": 1.0})
    with pytest.raises(RuntimeError, match="unforeseen"):
        start.rank(2, failing(RuntimeError("unforeseen")))
    assert (start.run / ENDED).read_text() == "1 rank 2: RuntimeError: unforeseen\n"


def test_what_submitit_starts_again(tmp_path: Path) -> None:
    loaded: LoadedConfig = load_config("quickstart", [f"output_dir={tmp_path}"])
    job = SlurmRank(loaded.tree, 1)
    assert job.checkpoint().function == job
    (tmp_path / "slurm").mkdir()
    (tmp_path / STARTS).write_text("none\nnone\n")
    assert job.checkpoint() is None
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert job.checkpoint().function == job


@pytest.mark.parametrize(
    ("time", "kind", "mode", "expected"),
    [
        ("None", "partition_prio", "REQUEUE", False),
        ("2030-01-01T00:00:00", "partition_prio", "REQUEUE", True),
        ("2030-01-01T00:00:00", "partition_prio", "GANG,REQUEUE", True),
        ("2030-01-01T00:00:00", "partition_prio", "CANCEL", False),
        ("2030-01-01T00:00:00", "qos", "REQUEUE", False),
    ],
)
def test_who_requeues_a_preempted_job(
    monkeypatch: pytest.MonkeyPatch, time: str, kind: str, mode: str, expected: bool
) -> None:
    def run(command: list[str], **options: Any) -> Any:
        text = JOB if command[3] == "job" else ANSWERS[command[3]]
        return SimpleNamespace(stdout=text.format(time=time, kind=kind, mode=mode))

    monkeypatch.setattr("subprocess.run", run)
    assert is_requeued_by_slurm("7") == expected
