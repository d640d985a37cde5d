"""What SLURM says of a job, and following one; SLURM's commands are stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl.errors import UserError
from cosmos_ssl_launch import commands, slurm
from cosmos_ssl_launch.slurm import JobState, Submission, check_not_queued, job_state, parse_state, show_log

SHOWN = (  # a line of SLURM 24.11, shortened
    "JobId=12 JobName=a UserId=root(0) Priority=1 JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
    "Restarts=2 "
    "BatchFlag=1 Reboot=0 ExitCode={code} RunTime=00:00:09 TimeLimit=00:10:00\n"
)


@pytest.mark.parametrize(
    ("state", "code", "active", "expected"),
    [
        ("COMPLETED", "0:0", False, 0),
        ("FAILED", "1:0", False, 1),
        ("FAILED", "74:0", False, 74),
        ("FAILED", "0:9", False, 74),
        ("CANCELLED", "0:15", False, 75),
        ("TIMEOUT", "0:0", False, 75),
        ("PREEMPTED", "0:0", False, 75),
        ("NODE_FAIL", "0:0", False, 74),
        ("OUT_OF_MEMORY", "0:125", False, 74),
        ("PENDING", "0:0", True, None),
        ("RUNNING", "0:0", True, None),
        ("COMPLETING", "0:0", True, None),
        ("REQUEUED", "0:0", True, None),
    ],
)
def test_states(state: str, code: str, active: bool, expected: int | None) -> None:
    found = parse_state(SHOWN.format(state=state, reason="None", code=code))
    assert (found.name, found.restarts, found.is_active) == (state, 2, active)
    assert expected is None or found.code == expected


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[JobState | None]:
    """What SLURM answers, one after the other; the last one again and again."""
    answers: list[JobState | None] = []
    monkeypatch.setattr(slurm, "job_state", lambda job_id: answers.pop(0) if len(answers) > 1 else answers[0])
    monkeypatch.setattr(commands, "job_state", lambda job_id: answers[0])
    return answers


def test_followed_through_a_restart(
    states: list[JobState | None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submission = Submission("12", tmp_path, {})
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if submission.log.exists():
            with submission.log.open("a") as file:
                file.write(f"line {len(waits)}\n")

    monkeypatch.setattr(slurm.time, "sleep", sleep)
    states += [*map(JobState, ("PENDING", "RUNNING", "PENDING", "RUNNING")), JobState("FAILED", exit_code=75)]
    assert show_log(submission) == 75 and capsys.readouterr().out == ""  # nothing was printed at all
    waits.clear()
    states[:] = [JobState("RUNNING"), JobState("PENDING"), JobState("COMPLETED")]
    submission.log.write_text("line 0\n")
    assert show_log(submission) == 0
    assert capsys.readouterr().out == "line 0\nline 1\nline 2\n"
    states[:] = [None]
    with pytest.raises(UserError, match="SLURM has forgotten job 12"):
        show_log(submission)


def test_a_folder_with_a_job_is_not_given_another(states: list[JobState | None], tmp_path: Path) -> None:
    check_not_queued(tmp_path)
    Submission("12_1", tmp_path / "logs", {"kind": "slurm"}).record(tmp_path)
    assert Submission.of(tmp_path) == Submission("12_1", tmp_path / "logs", {"kind": "slurm"})
    states += [JobState("PENDING")]
    with pytest.raises(UserError, match=r"has job 12_1 \(PENDING\). End it first: cosmos-launch cancel "):
        check_not_queued(tmp_path)
    for ended in (JobState("CANCELLED"), None):
        states[:] = [ended]
        check_not_queued(tmp_path)


def test_status_of_a_job(states: list[JobState | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Submission("12", tmp_path / "slurm", {"kind": "slurm"}).record(tmp_path)
    (tmp_path / "slurm" / "config.yaml").write_text("")
    (tmp_path / "result.json").write_text(json.dumps({"step": 1234, "metrics": {}}))
    lines = {
        "PENDING (BeginTime)": JobState("PENDING", "BeginTime"),
        "FAILED, exit code 74": JobState("FAILED", exit_code=74),
    }
    for words, state in (lines | {"ended (SLURM has forgotten it)": None}).items():
        states[:] = [state]
        commands.status(tmp_path)
        shown = capsys.readouterr().out
        assert f"job         12: {words}\n" in shown and "finished    yes, at step 1,234\n" in shown


def test_slurm_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="scontrol is not found here"):
        job_state("12")
    fake: Any = tmp_path / "scontrol"
    for answer, message in (
        ("Invalid job id specified", None),
        ("Unable to contact slurm controller", "cannot be asked about job 12: .*contact"),
    ):
        fake.write_text(f"#!/bin/sh\necho 'slurm_load_jobs error: {answer}' >&2; exit 1\n")
        fake.chmod(0o755)
        if message is None:
            assert job_state("12") is None
        else:
            with pytest.raises(UserError, match=message):
                job_state("12")
