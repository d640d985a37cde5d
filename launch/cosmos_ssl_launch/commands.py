"""``cosmos-launch status|resume|cancel RUN_FOLDER``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cosmos_ssl.config.source import dump_yaml
from cosmos_ssl.errors import EXIT_DONE, UserError, printable
from cosmos_ssl.files import read_object
from cosmos_ssl_launch.launch import launch
from cosmos_ssl_launch.requeue import NONE, newest_checkpoint, starts
from cosmos_ssl_launch.slurm import QUEUED_CONFIG, JobState, Submission, check_not_queued, job_state
from cosmos_ssl_launch.slurm import cancel as cancel_job


def status(run: Path) -> int:
    """Say where a run stands."""
    _check_run(run)
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
    _check_run(run)
    submission = Submission.of(run)
    state = None if submission is None else job_state(submission.job_id)
    if submission is None or state is None or not state.is_active:
        raise UserError(f"run folder {run} has no job that waits or runs")
    cancel_job(submission.job_id)
    print(f"job {submission.job_id} is cancelled; it saves first. To go on later: cosmos-launch resume {run}")
    return EXIT_DONE


def resume(
    run: Path, overrides: Sequence[str], *, profile: str | None = None, follow: bool = False, snapshot: bool = True
) -> int:
    """Go on where a run stands: with its config, and where it ran before unless ``profile`` says otherwise."""
    _check_run(run)
    check_not_queued(run)
    config = next((path for name in (QUEUED_CONFIG, "config.yaml") if (path := run / name).exists()), None)
    if config is None:
        raise UserError(f"run folder {run} holds no config. Start the run by cosmos-launch --config")
    submission = Submission.of(run)
    values = [f"output_dir={run}", *overrides]
    with TemporaryDirectory() as folder:
        if profile is None and submission is not None:
            path = Path(folder) / "profile.yaml"
            path.write_text(dump_yaml({key: value for key, value in submission.profile.items() if value is not None}))
            profile = str(path)
        return launch([str(config)], values, profile=profile, follow=follow, snapshot=snapshot)


def _check_run(run: Path) -> None:
    if not any((run / name).exists() for name in ("config.yaml", QUEUED_CONFIG)):
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
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut off, or being written
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row
    return {}
