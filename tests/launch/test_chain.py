"""A chain of jobs of one run: what is given to sbatch, which job goes on, which ends at once, and the words on it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl.config import load_config
from cosmos_ssl.errors import ConfigError, UserError
from cosmos_ssl_launch import commands, slurm
from cosmos_ssl_launch.profile import SlurmProfile, read_profile
from cosmos_ssl_launch.requeue import ENDED, OVER, STARTS, after_link, before_link, before_srun
from cosmos_ssl_launch.slurm import JobState, Submission, batch_script, check_not_queued, show_log, submit

A = "step_00000010"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run's folder"
    (folder / "slurm").mkdir(parents=True)
    return folder


def link(run: Path, command: str, number: int = 7) -> tuple[int, str]:
    """Let the script of one job run, with ``command`` in srun's place; its exit code and what it prints."""
    script = "\n".join([*before_srun([run]), *before_link(2), f"echo trains; {command}", *after_link()])
    variables = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": str(number)}
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("command", "code", "left"),
    [
        ("true", 0, "the run is finished"),
        (f'printf "2 rank 1: data: no such shard\n" > "$run/{ENDED}"; sh -c "exit 137"', 2, "rank 1: data: no such"),
        ('sh -c "exit 1"', 1, "job 7 ended with exit code 1"),
        ('sh -c "exit 127"', 127, "job 7 ended with exit code 127"),
        *((f'sh -c "exit {code}"', code, "") for code in (74, 75, 137, 143)),
        (f'printf "75 saved on a signal\n" > "$run/{ENDED}"; sh -c "exit 143"', 75, ""),
    ],
)
def test_what_the_next_job_does(run: Path, command: str, code: int, left: str) -> None:
    """After the end or a failure that would come again it ends at once with the same code, else it trains."""
    assert link(run, command)[0] == code
    found, said = link(run, "true", 8)
    if left:
        assert found == code and said.startswith("job 8 of the chain ends at once: ") and left in said
        assert link(run, "true", 9) == (code, said.replace("8", "9", 1))
    else:
        assert (found, said) == (0, "trains\n") and (run / OVER).read_text() == "0 the run is finished\n"


def test_jobs_without_a_new_checkpoint_end_the_chain(run: Path) -> None:
    """Also where each was killed before it could say anything; a finished run stays finished."""
    (run / "checkpoints" / A).mkdir(parents=True)
    (run / STARTS).write_text(f"none\n{A}\n{A}\n")
    assert link(run, "true")[1] == "trains\n"
    (run / STARTS).write_text(f"{A}\n" * 3)
    assert link(run, "true") == (0, "job 7 of the chain ends at once: the run is finished\n")
    (run / OVER).unlink()
    assert link(run, "true") == (74, "job 7 of the chain ends at once: 2 restarts have brought no new checkpoint\n")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for SLURM's commands; the file with what sbatch and scancel were given. The fourth job is refused."""
    given = tmp_path / "given"
    sbatch = f"""\
number=$(( $(grep -c sbatch {given} 2> /dev/null) + 11 ))
echo "sbatch $(grep -E -- '--(dependency|no-requeue|requeue|job-name)' "$1" | tr '\\n' ' ')" >> {given}
[ $number -lt 14 ] || {{ echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}
echo "Submitted batch job $number"
"""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", sbatch), ("srun", ""), ("scancel", f'echo "scancel $@" >> {given}')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return given


def test_what_sbatch_is_given(cluster: Path, tmp_path: Path) -> None:
    """Each waits for the one before, whatever becomes of it; where one is refused, none is left."""
    loaded = load_config("quickstart", [f"output_dir={tmp_path / 'run'}"])
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    for name in (STARTS, OVER):
        (tmp_path / "run" / name).write_text("none\n")  # of an earlier chain
    profile = SlurmProfile(kind="slurm", chain=3)
    [found] = submit([loaded], profile, snapshot=False)
    assert Submission.of(tmp_path / "run") == found and found.jobs == ("11", "12", "13")
    told = [re.findall(r"--[\w-]+(?:=[\w:]+)?", line) for line in cluster.read_text().splitlines()]
    own = ["--job-name=quickstart", "--no-requeue"]
    assert told == [own, *([f"--dependency=afterany:{number}", *own] for number in (11, 12))]
    assert not (tmp_path / "run" / STARTS).exists() and not (tmp_path / "run" / OVER).exists()
    script = batch_script([loaded, loaded], profile, snapshot=False)  # each a chain of its own, no array
    assert script.count("--no-requeue") == 2 and "--array" not in script and "scontrol requeue" not in script
    cluster.unlink()
    with pytest.raises(UserError, match=r"QOSMax.* \(job 4 of profile.chain=5; those before it are cancelled\)"):
        submit([loaded], profile.model_copy(update={"chain": 5}), snapshot=False)
    assert cluster.read_text().splitlines()[-1] == "scancel 13 12 11"


def test_status_cancel_and_follow_speak_of_the_chain(
    run: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Submission("11", run / "slurm", {"kind": "slurm"}, ("12", "13")).record(run)
    (run / "slurm" / "config.yaml").touch()
    (run / STARTS).write_text("none\nnone\n")
    states: dict[str, Any] = {"11": JobState("FAILED", exit_code=75), "12": JobState("RUNNING")}
    states["13"] = JobState("PENDING", "Dependency")
    monkeypatch.setattr(slurm, "job_state", states.get)
    monkeypatch.setattr(commands, "job_state", states.get)
    with pytest.raises(UserError, match=r"has job 12 \(RUNNING\)"):
        check_not_queued(run)
    commands.status(run)
    shown = capsys.readouterr().out
    assert "job         12: RUNNING\nchain       job 2 of 3, 1 after it: 13\n" in shown
    assert f"log         {run}/slurm/12_0_log.out" in shown
    assert commands.cancel(run) == 0 and cluster.read_text() == "scancel 13 12\n"
    assert "job 12 is cancelled, and of its chain 13; it saves first" in capsys.readouterr().out
    states |= {"12": JobState("COMPLETED"), "13": None}
    (run / OVER).write_text("0 the run is finished\n")
    commands.status(run)
    assert "job         12: COMPLETED, exit code 0\nchain       3 jobs, none is left: the run is finished\n" in (
        capsys.readouterr().out
    )
    (run / OVER).unlink()
    states["13"] = JobState("FAILED", exit_code=75)
    (run / "slurm" / "13_0_log.out").write_text("step 3\n")
    assert show_log(Submission.of(run) or pytest.fail()) == 75
    assert capsys.readouterr().out.endswith("job 12 of the chain has ended, the next is 13\nstep 3\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm", "chain=0"], "profile.chain: "),
        (["slurm", "chain=1000000000"], "profile.chain: expected less than or equal to 1000, got 1000000000"),
        (["local", "chain=2"], "profile.chain: unknown key. Accepts: kind, nproc; chain is of profiles of kind slurm"),
        (["slurm", "chain=2", "slurm={requeue: true}"], "profile.chain: expected no slurm.requeue beside it"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_profile(words[0], words[1:])
    assert message in str(caught.value) and "\n" not in str(caught.value)
