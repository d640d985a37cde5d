"""``cosmos-launch`` up to the point where training starts: on this machine, and what would be given to SLURM."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl import build
from cosmos_ssl.build import readiness
from cosmos_ssl.config import LoadedConfig
from cosmos_ssl.errors import StorageError
from cosmos_ssl_launch import launch as launch_module
from cosmos_ssl_launch import main

Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[LoadedConfig]:
    """The runs that were started; nothing is trained."""
    runs: list[LoadedConfig] = []
    monkeypatch.setattr(build, "check", lambda loaded: None)
    monkeypatch.setattr(build, "run", lambda loaded, fork: runs.append(loaded))
    monkeypatch.setattr(readiness, "dry_run", lambda loaded, here, ranks, fork: "the data")
    return runs


@pytest.fixture
def launch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[LoadedConfig]
) -> Launch:
    monkeypatch.chdir(tmp_path)
    for variable in ("COSMOS_PROFILE", "WORLD_SIZE", "RANK"):
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
    said = (
        "# all checks passed (not looked into: the data). Without --dry-run this trains here, in one process, "
        "into there\n"
    )
    assert out.endswith(said)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("profile.nproc=2", "data: no such shard: cc3m/train-0000.tar (576 of 576 shards are missing)"),
        (
            "profile.nproc=3",
            "training.batch_size: 1024 cannot be shared by 3 ranks (loader.lanes: 256). Possible: 1, 2, 4, 8, ",
        ),
        ("profile.nproc=many", "command line  profile.nproc: expected an integer, got 'many'"),
        ("profile.nproc=0", "command line  profile.nproc: expected greater than 0, got 0"),
        ("profile.nprocs=1", "command line  profile.nprocs: unknown key. Did you mean 'nproc'? Accepts: kind, nproc"),
        (
            "profile=cluster.yaml",
            "no profile 'cluster.yaml': there is no such file. Those that come with cosmos-ssl: local, slurm, ",
        ),
        ("--profile=slrm", "no profile 'slrm': there is no such file. Did you mean 'slurm'?"),
        ("training.batchsize=8", "command line  training.batchsize: unknown key. Did you mean 'batch_size'?"),
    ],
)
def test_refusals(launch: Launch, trained: list[LoadedConfig], argument: str, message: str) -> None:
    code, out, err = launch(argument)
    assert code == 2 and not out and not trained and err.startswith(message)


def test_profile_from_flag_config_and_environment_in_that_order(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSMOS_PROFILE", "from_environment")
    assert launch()[2].startswith("no profile 'from_environment'")
    assert launch("profile=from_config")[2].startswith("no profile 'from_config'")
    assert launch("profile=from_config", "--profile", "local")[0] == 0


def test_a_world_started_by_others_is_joined(
    launch: Launch, trained: list[LoadedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COSMOS_PROFILE", "slurm")
    code, out, _ = launch("profile.nproc=4")
    assert code == 0 and len(trained) == 1 and out.startswith("training here, as one of 2 ranks, into ")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "cannot be shared by 3 ranks" in launch()[2]


def test_what_a_run_goes_on_from_is_handed_on(launch: Launch, monkeypatch: pytest.MonkeyPatch, no_slurm: None) -> None:
    """To the check, to the one process, and before several are started or a job is queued to the folder."""
    told: list[tuple[str, str | None]] = []
    monkeypatch.setattr(build, "run", lambda loaded, fork: told.append(("run", fork)))
    monkeypatch.setattr(readiness, "dry_run", lambda loaded, here, ranks, fork: told.append(("check", fork)) or "")
    monkeypatch.setattr(readiness, "make_ready", lambda loaded, fork, scan=True: told.append(("prepare", fork)))
    monkeypatch.setattr(
        launch_module,
        "run_ranks",
        lambda arguments, ranks, folder: told.append(("ranks", " ".join(arguments[:2]))) or 0,
    )
    for words in (["--dry-run"], [], ["profile.nproc=2"], ["--profile", "slurm"]):
        launch("--fork", "old", "output_dir=new", *words)
    assert told == [
        ("check", "old"),
        ("run", "old"),
        ("prepare", "old"),
        ("ranks", "--config methods/clip"),
        ("prepare", "old"),
    ]


def test_exit_code_of_the_run(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(loaded: LoadedConfig, fork: str | None) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(build, "run", run)
    assert launch()[::2] == (74, "no space\n")


def test_config_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--dry-run"])
    assert left.value.code == 2 and "--config" in capsys.readouterr().err


def test_what_slurm_would_be_given(launch: Launch, trained: list[LoadedConfig], tmp_path: Path) -> None:
    """Without SLURM: the resolved config, and a script that bash can read, with all that the profile says."""
    (tmp_path / "mine.yaml").write_text(
        "kind: slurm\nnodes: 2\ntasks_per_node: 4\ngpus_per_node: 4\ncpus_per_task: 12\nmem: 0\ntime: "
        "1-00:00:00\nqos: long\n"
        "setup: [module load cuda]\nenvironment: {GREETING: it's me}\nslurm: {exclusive: true, mail-type: FAIL}\n"
        "srun_args: [--container-image=a b.sqsh]\npython: python3\n"
    )
    code, out, err = launch("--dry-run", "--profile", "mine.yaml", "name=a b", "profile.partition=gpu")
    assert (code, err) == (0, "") and not trained and not (tmp_path / "runs").exists()
    config, _, script = out.partition(
        "# all checks passed (not looked into: the data). Without --dry-run this is given to sbatch:\n"
    )
    assert "name: a b\n" in config and "device: cuda\n" in config
    assert "device: cpu\n" in launch("--dry-run", "--profile", "mine.yaml", "training.device=cpu")[1]
    gres = launch("--dry-run", "--profile", "mine.yaml", "profile.gpus_per_node=0", "profile.slurm={gres: 'gpu:4'}")[1]
    none = launch("--dry-run", "--profile", "mine.yaml", "profile.gpus_per_node=0")[1]
    assert "device: cuda\n" in gres and "device: auto\n" in none
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")}
    assert options >= {
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "cpus-per-task=12",
        "mem=0",
        "time=1440",
        "qos=long",
    }
    assert options >= {"partition=gpu", "exclusive", "mail-type=FAIL", "requeue", "signal=USR2@120", "open-mode=append"}
    lines = script.splitlines()
    [srun] = [line for line in lines if line.startswith("srun ")]
    assert (
        "--kill-on-bad-exit=1" in srun
        and "--cpus-per-task=12" in srun
        and "'--container-image=a b.sqsh' python3 -u -m submitit" in srun
    )
    order = ["module load cuda", "export GREETING='it'\"'\"'s me'"]
    order += ['export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"', srun, "code=$?"]
    assert [line for line in lines if line in order] == order
    assert "PYTHONPATH=" not in launch("--dry-run", "--profile", "mine.yaml", "--no-snapshot")[1]


def test_an_array(launch: Launch, trained: list[LoadedConfig], tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: methods/clip\nname: other\n")
    _, out, err = launch("--config", "other.yaml", "--profile", "slurm", "--dry-run")
    assert "#SBATCH --array=0-1%2\n" in out, err
    assert f"runs=('{tmp_path}/runs/clip_vitb16_cc3m' '{tmp_path}/runs/other')\n" in out
    assert "several configs are queued as a job array" in launch("--config", "other.yaml")[2]
    assert (
        "would be the run folder of several configs"
        in launch("--config", "other.yaml", "--profile", "slurm", "output_dir=a")[2]
    )
    assert "cannot be shared by 3 ranks" in launch("--config", "other.yaml", "--profile", "slurm", "profile.nodes=3")[2]


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_before_anything_is_queued(launch: Launch, tmp_path: Path, no_slurm: None) -> None:
    """Missing shards, shards that are not indexed, and a machine without SLURM."""
    words = ["--profile", "slurm", "data.train_data=shards/train-{0..1}.tar", "evaluators=null"]
    assert launch(*words)[::2] == (2, "data: no such shard: shards/train-0.tar (2 of 2 shards are missing)\n")
    write_shards(tmp_path / "shards")
    assert launch(*words)[::2] == (
        2,
        "data: these shards are not indexed yet. Run: cosmos-ssl data index 'shards/train-{0..1}.tar'\n",
    )
    from cosmos_ssl.cli import main as cosmos_ssl

    assert cosmos_ssl(["data", "index", "shards/train-{0..1}.tar"]) == 0
    assert "sbatch and srun are not found here. Use a login node, or --profile local" in launch(*words)[2]


def write_shards(folder: Path) -> None:
    """Two shards of a picture and a caption each."""
    from io import BytesIO

    import webdataset
    from PIL import Image

    folder.mkdir()
    text = json.dumps({"raw_caption": ["a picture"], "shortIB_captions": ["a picture"]}).encode()
    picture = BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "png")
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"train-{number}.tar")) as tar:
            tar.write({"__key__": str(number), "png": picture.getvalue(), "json": text})


@pytest.mark.parametrize("command", ["status", "cancel", "resume"])
def test_commands_on_a_folder_that_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    assert main([command, str(tmp_path)]) == 2 and "is no run folder" in capsys.readouterr().err


def test_status_and_resume_of_a_local_run(
    launch: Launch, trained: list[LoadedConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = launch("--dry-run", "training.seed=5")
    run = Path("elsewhere")
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    (run / "config.yaml").write_text(out)
    (run / "metrics.jsonl").write_text(
        '{"step": 9, "loss": 2.5}\n{"step": 10, "retrieval/student/R@1": 3.0}\n{"step": 1'
    )
    assert main(["status", "elsewhere"]) == 0
    assert capsys.readouterr().out == (
        "run         elsewhere\ncheckpoint  elsewhere/checkpoints/step_00000010\nstep        10\nfinished    no\n"
    )
    assert main(["resume", "elsewhere", "training.max_nonfinite_steps=7"]) == 0
    config = trained[0].config
    assert (config.training.seed, config.training.max_nonfinite_steps, config.folder) == (5, 7, Path("elsewhere"))
    assert main(["cancel", "elsewhere"]) == 2 and "has no job that waits or runs" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"job": 3}', "[" * 100_000, '{"step": true, "metrics": {}}'])
def test_commands_on_a_run_that_is_damaged(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    """One sentence, and what to do; rows that are none are passed over, whatever else they hold."""
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "config.yaml").write_text("extends: methods/clip")
    (run / "metrics.jsonl").write_text(f"{text}\n")
    assert main(["status", str(run)]) == 0
    for name, advice in (("result.json", "the run is finished"), ("slurm/submission.json", "delete it")):
        (run / name).write_text(text)
        for command in ["status"] if name == "result.json" else ["status", "cancel", "resume"]:
            capsys.readouterr()
            assert main([command, str(run)]) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"{run}/{name} ") and advice in err and err.count("\n") == 1
