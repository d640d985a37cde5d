"""``cosmos-launch`` on this machine, up to the point where training starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl import build
from cosmos_ssl.config import LoadedConfig
from cosmos_ssl.errors import StorageError
from cosmos_ssl_launch import main

Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[LoadedConfig]:
    """The runs that were started; nothing is trained."""
    runs: list[LoadedConfig] = []
    monkeypatch.setattr(build, "check", lambda loaded: None)
    monkeypatch.setattr(build, "run", runs.append)
    return runs


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[LoadedConfig]) -> Launch:
    monkeypatch.chdir(tmp_path)
    for variable in ("COSMOS_PROFILE", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)

    def launch(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["--config", "methods/clip", *argv])
        out, err = capsys.readouterr()
        return code, out, err

    return launch


def test_trains_here_and_says_so(launch: Launch, trained: list[LoadedConfig]) -> None:
    code, out, err = launch("training.seed=3", "--profile", "local", "profile.nproc=1", "name=a")
    assert (code, out, err) == (0, "training here, in one process, into runs/a\n", "")
    assert trained[0].config.training.seed == 3 and trained[0].config.profile is None


def test_dry_run_prints_the_resolved_config(launch: Launch, trained: list[LoadedConfig]) -> None:
    code, out, _ = launch("--dry-run", "output_dir=there")
    assert code == 0 and not trained and "output_dir: there\n" in out
    assert out.endswith("# both stages of checks passed. Without --dry-run this trains here, in one process, into there\n")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("profile.nproc=2", "data: no such shard: cc3m/train-0000.tar (576 of 576 shards are missing)"),
        ("profile.nproc=3", "training.batch_size: 1024 cannot be shared by 3 ranks (loader.lanes: 256). Possible: 1, 2, 4, 8, "),
        ("profile.nproc=many", "command line  profile.nproc: expected an integer, got 'many'"),
        ("profile.nproc=0", "command line  profile.nproc: expected greater than 0, got 0"),
        ("profile.nprocs=1", "command line  profile.nprocs: unknown key. Did you mean 'nproc'? Accepts: nproc"),
        ("profile=cluster.yaml", "profile 'cluster.yaml': clusters come with a later release"),
        ("--profile=cluster.yaml", "profile 'cluster.yaml': clusters come with a later release"),
        ("training.batchsize=8", "command line  training.batchsize: unknown key. Did you mean 'batch_size'?"),
    ],
)
def test_refusals(launch: Launch, trained: list[LoadedConfig], argument: str, message: str) -> None:
    code, out, err = launch(argument)
    assert code == 2 and not out and not trained and err.startswith(message)


def test_profile_from_the_environment(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSMOS_PROFILE", "slurm")
    assert launch()[2].startswith("profile 'slurm': ") and launch("--profile", "local")[0] == 0


def test_a_world_started_by_others_is_joined(launch: Launch, trained: list[LoadedConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, out, _ = launch("profile.nproc=4")
    assert code == 0 and len(trained) == 1 and out.startswith("training here, as one of 2 ranks, into ")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "cannot be shared by 3 ranks" in launch()[2]


def test_exit_code_of_the_run(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(loaded: LoadedConfig) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(build, "run", run)
    assert launch()[::2] == (74, "no space\n")


def test_config_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--dry-run"])
    assert left.value.code == 2 and "--config" in capsys.readouterr().err
