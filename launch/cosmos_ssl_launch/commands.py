"""``cosmos-launch status|cancel RUN_FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosmos_ssl.errors import EXIT_DONE, UserError, printable
from cosmos_ssl.files import is_run_folder, metrics_row, read_object
from cosmos_ssl_launch.job import log_file
from cosmos_ssl_launch.requeue import NONE, OVER, newest_checkpoint, starts
from cosmos_ssl_launch.slurm import JobState, Submission, active_jobs, job_state
from cosmos_ssl_launch.slurm import cancel as cancel_job


def status(run: Path) -> int:
    """Say where a run stands."""
    check_run(run)
    submission = Submission.of(run)
    lines = [f"{'run':<12}{run}"]
    if submission is not None:
        active = active_jobs(submission)
        job = active[0][0] if active else _last_to_work(submission, run)
        lines.append(f"{'job':<12}{job}: {_words(active[0][1] if active else job_state(job))}")
        if submission.followers:
            lines.append(f"{'chain':<12}{_chain(submission, run, active)}")
        lines.append(f"{'starts':<12}{len(starts(run))}")
        lines.append(f"{'log':<12}{log_file(submission.folder, job)}")
    newest = newest_checkpoint(run)
    lines.append(f"{'checkpoint':<12}{newest if newest == NONE else run / 'checkpoints' / newest}")
    if row := _last_row(run / "metrics.jsonl"):
        lines.append(
            f"{'step':<12}{row['step']:,}" + (f", loss {row['loss']:.4g}" if isinstance(row.get("loss"), float) else "")
        )
    finished = run / "result.json"
    result = read_object(finished, {"step": int}, "It says whether the run is finished") if finished.exists() else None
    lines.append(f"{'finished':<12}{'no' if result is None else 'yes, at step {:,}'.format(result['step'])}")
    print(printable("\n".join(lines)))
    return EXIT_DONE


def cancel(run: Path) -> int:
    """End the job of a run, or what is left of its chain. It saves first, and is not started again."""
    check_run(run)
    submission = Submission.of(run)
    active = [] if submission is None else active_jobs(submission)
    if not active:
        raise UserError(f"run folder {run} has no job that waits or runs")
    jobs = [job for job, _ in active]
    cancel_job(*jobs)
    rest = f", and of its chain {', '.join(jobs[1:])}" if jobs[1:] else ""
    print(f"job {jobs[0]} is cancelled{rest}; it saves first. To go on later: cosmos-launch resume {run}")
    return EXIT_DONE


def check_run(run: Path) -> None:
    """Raise UserError unless ``run`` is the folder of a run."""
    if not is_run_folder(run):
        raise UserError(f"{run} is no run folder: it holds no config.yaml")


def _last_to_work(submission: Submission, run: Path) -> str:
    """The job that was the last to train, in an ended chain too: one start is noted of each."""
    return submission.jobs[min(max(len(starts(run)), 1), len(submission.jobs)) - 1]


def _chain(submission: Submission, run: Path, active: Sequence[tuple[str, JobState]]) -> str:
    """How far a chain is, in words."""
    count, over = len(submission.jobs), run / OVER
    why = over.read_text(encoding="utf-8", errors="replace").strip().partition(" ")[2] if over.exists() else ""
    if not active:
        return f"{count} jobs, none is left" + (f": {why}" if why else "")
    number, waiting = submission.jobs.index(active[0][0]) + 1, [job for job, _ in active[1:]]
    left = f"{len(waiting)} after it: {', '.join(waiting)}" if waiting else "the last"
    return f"job {number} of {count}, {left}" + (f" (they end at once: {why})" if why else "")


def _words(state: JobState | None) -> str:
    if state is None:
        return "ended (SLURM has forgotten it)"
    if not state.is_active:
        return f"{state.name}, exit code {state.code}"
    return state.name + (f" ({state.reason})" if state.reason not in ("", "None") else "")


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of metrics."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().splitlines()
    return next((row for line in reversed(lines) if (row := metrics_row(line)) is not None), {})
