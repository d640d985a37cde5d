"""The world that a process was started in: variables that are whole, half set, or make no sense."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from cosmos_ssl.config.ranks import started_ranks
from cosmos_ssl.engine.distributed import joined_world
from cosmos_ssl.errors import UserError
from cosmos_ssl_launch import main

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
SRUN |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *TORCHRUN,
        "LOCAL_WORLD_SIZE",
        "SUBMITIT_EXECUTOR",
        *(name for name in os.environ if name.startswith("SLURM_")),
    ):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("told", "ranks"),
    [
        ({}, 1),
        (TORCHRUN, 2),
        (SRUN, 4),
        ({**SRUN, **TORCHRUN}, 2),
        ({"WORLD_SIZE": "1"}, 1),
        ({"MASTER_ADDR": "node1", "LOCAL_RANK": "0"}, 1),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, 1),  # within a job, but not started by srun
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, 1),
    ],
)
def test_whole(monkeypatch: pytest.MonkeyPatch, told: dict[str, str], ranks: int) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert started_ranks() == ranks


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is set (2), and RANK, MASTER_ADDR, MASTER_PORT are not. Start ranks by torchrun, srun",
        ),
        ({"WORLD_SIZE": "x"}, "the environment variable WORLD_SIZE is 'x', expected a whole number from 1 on. "),
        ({"WORLD_SIZE": "0"}, "the environment variable WORLD_SIZE is '0', expected a whole number from 1 on. "),
        ({"WORLD_SIZE": ""}, "the environment variable WORLD_SIZE is '', expected"),
        (
            {"WORLD_SIZE": "-2", **{name: value for name, value in TORCHRUN.items() if name != "WORLD_SIZE"}},
            "WORLD_SIZE is '-2'",
        ),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '99999"),
        ({"RANK": "0"}, "RANK is set (0), and WORLD_SIZE is not. "),
        ({**TORCHRUN, "RANK": "2"}, "the environment variable RANK is '2', expected a number below WORLD_SIZE (2). "),
        ({**TORCHRUN, "RANK": "a"}, "the environment variable RANK is 'a', expected a whole number from 0 on. "),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "WORLD_SIZE is set (2), and MASTER_ADDR is not. "),
        ({**TORCHRUN, "MASTER_PORT": "port"}, "MASTER_PORT is 'port', expected a whole number from 1 to 65,535. "),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is '70000', expected a whole number from 1 to 65,535. "),
        ({"LOCAL_RANK": "gpu"}, "LOCAL_RANK is 'gpu', expected a whole number from 0 on. "),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "x"},
            "the environment variable SLURM_NTASKS is 'x', expected a whole number from 1 on. ",
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"},
            "SLURM_NTASKS is set (4), and SLURM_PROCID, SLURM_LOCALID, SLURM_JOB_NUM_NODES, ",
        ),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID is '4', expected a number below SLURM_NTASKS (4). "),
        ({**SRUN, "SLURM_LOCALID": "?"}, "SLURM_LOCALID is '?'"),
    ],
)
def test_half_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], told: dict[str, str], message: str
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", "quickstart"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    with pytest.raises(UserError), joined_world("cpu"):
        pass


def test_ranks_of_srun_alone_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without submitit's own start; an address that was given is kept."""
    for name, value in {**SRUN, "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    met: dict[str, str] = {}
    store = HashStore()
    store.multi_set([f"left/{rank}" for rank in range(4)], [""] * 4)
    monkeypatch.setattr("cosmos_ssl.engine.distributed.rendezvous", lambda *args, **options: iter([(store, 3, 4)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **options: met.update({name: os.environ[name] for name in TORCHRUN})
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with joined_world("cpu"):
        assert met == {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
