"""``cosmos-launch status|cancel RUN_FOLDER``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos_ssl.errors import EXIT_DONE, UserError, printable
from cosmos_ssl.files import is_run_folder, metrics_row, read_object
from cosmos_ssl_launch.requeue import NONE, newest_checkpoint, starts
from cosmos_ssl_launch.slurm import JobState, Submission, job_state
from cosmos_ssl_launch.slurm import cancel as cancel_job


def status(run: Path) -> int:
    """Say where a run stands."""
    check_run(run)
    submission = Submission.of(run)
    lines = [f"{'run':<12}{run}"]
    if submission is not None:
        state = job_state(submission.job_id)
        lines.append(f"{'job':<12}{submission.job_id}: {_words(state)}")
        lines.append(f"{'starts':<12}{len(starts(run))}")
        lines.append(f"{'log':<12}{submission.log}")
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
    """End the job of a run. It saves first, and is not started again."""
    check_run(run)
    submission = Submission.of(run)
    state = None if submission is None else job_state(submission.job_id)
    if submission is None or state is None or not state.is_active:
        raise UserError(f"run folder {run} has no job that waits or runs")
    cancel_job(submission.job_id)
    print(f"job {submission.job_id} is cancelled; it saves first. To go on later: cosmos-launch resume {run}")
    return EXIT_DONE


def check_run(run: Path) -> None:
    """Raise UserError unless ``run`` is the folder of a run."""
    if not is_run_folder(run):
        raise UserError(f"{run} is no run folder: it holds no config.yaml")


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
