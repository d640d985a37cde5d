"""When a job starts again by itself: the rule, and the batch script's lines with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cosmos_ssl_launch.requeue import (
    ENDED,
    STARTS,
    after_srun,
    before_srun,
    may_restart,
    newest_checkpoint,
    note_end,
    note_start,
)

A, B = "step_00000010", "step_00000020"
RULE = [  # newest checkpoint at each start, newest now, whether a limit of 2 lets it start again
    ([], "none", True),
    (["none"], "none", True),
    (["none"] * 2, "none", True),
    (["none"] * 3, "none", False),
    (["none"] * 9, "none", False),
    (["none"] * 3, A, True),
    ([A, A, A], A, False),
    ([A, A, A], B, True),
    (["none", A, A], A, True),
    ([A, B, B], B, True),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a space and a quote in its name, and stand-ins for scontrol and squeue beside it."""
    folder = tmp_path / "a run's folder"
    (folder / "slurm").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", 'echo "$@" >> requeued; exit 1'), ("squeue", 'echo "${STATE:-RUNNING}"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return folder


def end(run: Path, code: int | str, *, limit: int = 2, **environment: str) -> tuple[int, str, list[str]]:
    """Let the script end after srun's exit code; its own one, what it prints, and the jobs that it requeued."""
    command = f"sh -c 'exit {code}'" if isinstance(code, int) else code
    script = "\n".join([*before_srun([run.parent / "other", run]), command, *after_srun(limit)])
    variables = {
        "PATH": f"{run.parent / 'bin'}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
    } | environment
    (run.parent / "requeued").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "-c", script], cwd=run.parent, env=variables, capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr
    requeued = run.parent / "requeued"
    return done.returncode, done.stdout, requeued.read_text().splitlines() if requeued.exists() else []


@pytest.mark.parametrize(("noted", "newest", "expected"), RULE)
def test_the_rule_in_python_and_in_the_script(run: Path, noted: list[str], newest: str, expected: bool) -> None:
    assert may_restart(noted, newest, 2) == expected
    (run / STARTS).write_text("".join(f"{line}\n" for line in noted))
    for name in (A, B):
        if name <= newest < "step_1":
            (run / "checkpoints" / name).mkdir(parents=True)
    (run / "checkpoints" / ".step_00000030.tmp").mkdir(parents=True)
    assert newest_checkpoint(run) == newest
    code, said, requeued = end(run, 74)
    assert code == 74 and requeued == (["requeue 7"] if expected else [])
    assert ("2 restarts have brought no new checkpoint, so job 7 ends here" in said) != expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [*((code, False) for code in (0, 1, 2, 75, 128, 255)), *((code, True) for code in (74, 130, 134, 137, 139, 143))],
)
def test_exit_codes(run: Path, code: int, expected: bool) -> None:
    found, _, requeued = end(run, code)
    assert found == code and bool(requeued) == expected


def test_what_nccl_has_written_since_the_start_is_named(run: Path) -> None:
    old, new = run / "nccl_rank0", run / "nccl_rank1"
    for number, path in enumerate((old, run / STARTS, new)):
        path.touch()
        os.utime(path, (number, number))
    assert end(run, 134)[1].startswith(f"the last collectives of a rank are in {new}\nexit code 134")
    assert "collectives" not in end(run, 0)[1]


def test_the_rank_that_failed_by_itself_decides(run: Path) -> None:
    failed = f'printf "1 rank 3: ValueError: no\\n" > "$run/{ENDED}"; sh -c "exit 137"'
    assert end(run, failed)[::2] == (1, [])
    assert end(run, 137)[2] == ["requeue 7"]  # that of an earlier start is forgotten


def test_only_a_running_job_and_only_this_task_of_an_array(run: Path) -> None:
    assert end(run, 74, STATE="COMPLETING")[2] == []
    assert end(run, 74, SLURM_ARRAY_JOB_ID="5")[2] == ["requeue 5_1"]


def test_starts_and_failures_are_noted(run: Path) -> None:
    assert note_start(run) == ["none"]
    (run / "checkpoints" / A).mkdir(parents=True)
    assert note_start(run) == ["none", A]
    note_end(run, 1, "rank 3")
    note_end(run, 2, "rank 0")
    assert (run / ENDED).read_text() == "1 rank 3\n"
