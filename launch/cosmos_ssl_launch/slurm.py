"""SLURM: how runs are queued, the batch script, submission through submitit, what the cluster says of a job."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_ssl.config import LoadedConfig
from cosmos_ssl.config.source import dump_yaml
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LOST, EXIT_SAVED, UserError
from cosmos_ssl.files import read_object
from cosmos_ssl_launch.job import SlurmRank, log_file
from cosmos_ssl_launch.profile import SlurmProfile
from cosmos_ssl_launch.requeue import after_srun, before_srun
from cosmos_ssl_launch.snapshot import CODE, drop_snapshot, take_snapshot

SUBMISSION = "slurm/submission.json"
"""In the run folder: the job, the folder of its logs, the profile."""

QUEUED_CONFIG = "slurm/config.yaml"
"""In the run folder: the resolved config of its last job."""

UNLIMITED = 1 << 30
"""Time-outs that submitit counts before it ends a job: ours alone (``requeue``) decides."""

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "REQUEUE_FED")
ACTIVE = (
    *WAITING,
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "STOPPED",
    "SUSPENDED",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
)


@dataclass(frozen=True, slots=True)
class Submission:
    """A job of one run: its id (``12_0`` in an array), the folder of its logs, the profile."""

    job_id: str
    folder: Path
    profile: Mapping[str, Any]

    @property
    def log(self) -> Path:
        """The file with what the first rank prints."""
        return log_file(self.folder, self.job_id)

    @classmethod
    def of(cls, run: Path) -> Submission | None:
        """The last job of a run folder, or None."""
        path = run / SUBMISSION
        if not path.exists():
            return None
        advice = "It tells the run's job: see that none is queued (squeue), and delete it"
        found = read_object(path, {"job": str, "folder": str, "profile": dict}, advice)
        return cls(found["job"], Path(found["folder"]), found["profile"])

    def record(self, run: Path) -> None:
        """Leave a note of it in the run folder."""
        path = run / SUBMISSION
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"job": self.job_id, "folder": str(self.folder), "profile": dict(self.profile)}, indent=1) + "\n"
        )


# ---------------------------------------------------------------------------- queueing


def queue(
    loaded: Sequence[LoadedConfig], place: SlurmProfile, *, fork: str | None, follow: bool, snapshot: bool
) -> int:
    """Queue one run, or several as an array, once all that can be checked here has been; the exit code."""
    from cosmos_ssl.build.readiness import make_ready

    if follow and len(loaded) > 1:
        raise UserError(
            "--follow shows one run; these are several. Leave it out, and see: cosmos-launch status RUN_FOLDER"
        )
    for one in loaded:
        check_not_queued(one.config.folder)
        make_ready(one, scan=False, fork=fork)
    for one in loaded:
        take_snapshot(one.config.folder, one.tree) if snapshot else drop_snapshot(one.config.folder)
    submissions = submit(loaded, place, snapshot=snapshot)
    for one, submission in zip(loaded, submissions, strict=True):
        print(
            f"queued as job {submission.job_id}, on {place.nodes} x {place.tasks_per_node} ranks, into "
            f"{one.config.folder}"
        )
        print(f"  log     {submission.log} (the other ranks: {submission.job_id}_RANK_log.out)")
        print(f"  follow  tail -F {submission.log}")
        print(f"  or      cosmos-launch status|cancel|resume {one.config.folder}", flush=True)
    if not follow:
        return EXIT_DONE
    try:
        return show_log(submissions[0])
    except KeyboardInterrupt:
        print(
            f"job {submissions[0].job_id} goes on. To end it: cosmos-launch cancel {loaded[0].config.folder}",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def check_not_queued(run: Path) -> None:
    """Raise UserError where a job of this run folder waits or runs."""
    submission = Submission.of(run)
    state = None if submission is None else job_state(submission.job_id)
    if submission is not None and state is not None and state.is_active:
        raise UserError(
            f"run folder {run} has job {submission.job_id} ({state.name}). End it first: cosmos-launch cancel {run}"
        )


# ---------------------------------------------------------------------------- submission


def submission_folder(runs: Sequence[Path]) -> Path:
    """The folder of the script, the pickled jobs and the logs: in the run folder, for an array beside the first
    one.
    """
    if len(runs) == 1:
        return (runs[0] / "slurm").absolute()
    return (runs[0].parent / f"array-{runs[0].name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def batch_script(loaded: Sequence[LoadedConfig], profile: SlurmProfile, *, snapshot: bool) -> str:
    """The script that would be given to sbatch."""
    executor = _executor(loaded, profile, submission_folder([one.config.folder for one in loaded]), snapshot=snapshot)
    if len(loaded) > 1:
        executor.parameters["map_count"] = len(loaded)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(
    loaded: Sequence[LoadedConfig], profile: SlurmProfile, *, snapshot: bool, probe: int | None = None
) -> list[Submission]:
    """Queue the runs, several as one array, or so many steps of them. Raises UserError where SLURM is not there or
    refuses.
    """
    folder = submission_folder([one.config.folder for one in loaded])
    executor = _executor(loaded, profile, folder, snapshot=snapshot)
    ranks = [SlurmRank(one.tree, profile.restarts_without_progress, probe) for one in loaded]
    found = [Submission(job_id, folder, profile.model_dump()) for job_id in give(executor, ranks)]
    for one, submission in zip(loaded, found, strict=True):
        submission.record(one.config.folder)
        (one.config.folder / QUEUED_CONFIG).write_text(dump_yaml(one.tree), encoding="utf-8")
    return found


def give(executor: Any, ranks: Sequence[Callable[[], object]]) -> list[str]:
    """Queue what is called on each rank, several as one array; the ids of the jobs.

    Raises UserError where SLURM is not there or refuses.
    """
    from submitit.core.utils import environment_variables
    from submitit.helpers import clean_env

    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "the profile is for SLURM, and sbatch and srun are not found here. Use a login node, or --profile local"
        )
    configuration = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with (
        clean_env(),
        environment_variables(**configuration),
    ):  # a job that is queued from within another inherits nothing of it
        try:
            return [job.job_id for job in executor.submit_array(list(ranks))]
        except Exception as error:
            if "sbatch" not in str(error):
                raise
            said = [line for line in str(error).splitlines() if line.startswith("sbatch:")] or str(error).splitlines()[
                -1:
            ]
            raise UserError(
                f"SLURM refused the job: {' '.join(line.removeprefix('sbatch: ') for line in said)}"
            ) from error


def _executor(loaded: Sequence[LoadedConfig], profile: SlurmProfile, folder: Path, *, snapshot: bool) -> Any:
    """Submitit's executor for these runs."""
    names = [one.config.name for one in loaded]
    return executor_of([one.config.folder for one in loaded], names, profile, folder, snapshot=snapshot)


def executor_of(
    runs: Sequence[Path], names: Sequence[str], profile: SlurmProfile, folder: Path, *, snapshot: bool
) -> Any:
    """Submitit's executor for jobs of these names that belong to these folders; ``folder`` gets scripts and logs."""
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]
        """Also where there is no srun: a dry run needs none."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = Executor(folder, max_num_timeout=UNLIMITED, python=profile.python)
    srun_args = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if profile.cpus_per_task is not None:
        srun_args.append(f"--cpus-per-task={profile.cpus_per_task}")  # srun does not take it over from sbatch
    given = ("partition", "account", "qos", "constraint", "mem", "gpus_per_node", "cpus_per_task")
    values = {name: value for name in given if (value := getattr(profile, name)) is not None}
    executor.update_parameters(
        job_name=names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more",
        nodes=profile.nodes,
        ntasks_per_node=profile.tasks_per_node,
        time=profile.time,
        signal_delay_s=profile.signal_delay_s,
        stderr_to_stdout=True,
        setup=[*before_srun(runs), *_set_up(profile, snapshot)],
        teardown=after_srun(profile.restarts_without_progress),
        srun_args=[*srun_args, *profile.srun_args],
        additional_parameters={
            "requeue": True,
            **{name: value for name, value in profile.slurm.items() if value is not False},
        },
        **values,
    )
    return executor


def _set_up(profile: SlurmProfile, snapshot: bool) -> list[str]:
    lines = [*profile.setup, f"export COSMOS_SIGNAL_DELAY_S={profile.signal_delay_s}"]
    lines += (f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items())
    return [*lines, f'export PYTHONPATH="$run/{CODE}${{PYTHONPATH:+:$PYTHONPATH}}"'] if snapshot else lines


# ---------------------------------------------------------------------------- what the cluster says


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as SLURM knows it: its state, why it waits, its exit code where it has one, how often it started
    again.
    """

    name: str
    reason: str = ""
    exit_code: int = 0
    signal: int = 0
    restarts: int = 0

    @property
    def is_active(self) -> bool:
        """Return whether it waits or runs."""
        return self.name in ACTIVE

    @property
    def code(self) -> int:
        """The exit code of a job that has ended."""
        if self.name in ("CANCELLED", "TIMEOUT", "PREEMPTED", "DEADLINE"):
            return EXIT_SAVED
        if self.name in ("COMPLETED", "FAILED"):
            return self.exit_code or (
                EXIT_LOST if self.signal else EXIT_DONE if self.name == "COMPLETED" else EXIT_FAILED
            )
        return EXIT_LOST


def job_state(job_id: str) -> JobState | None:
    """The state of a job, or None where SLURM does not know it (any more).

    Raises UserError where SLURM cannot be asked.
    """
    done = _slurm("scontrol", "-o", "show", "job", job_id)
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return None
        raise UserError(f"SLURM cannot be asked about job {job_id}: {done.stderr.strip()}")
    return parse_state(done.stdout)


def parse_state(text: str) -> JobState:
    """The first line of what ``scontrol -o show job`` prints."""
    values = dict(re.findall(r"(\w+)=(\S*)", text.partition("\n")[0]))
    code, _, number = values.get("ExitCode", "0:0").partition(":")
    return JobState(
        values["JobState"], values.get("Reason", ""), int(code), int(number or 0), int(values.get("Restarts", 0))
    )


def cancel(job_id: str) -> None:
    """End a job. Raises UserError where SLURM refuses."""
    done = _slurm("scancel", job_id)
    if done.returncode:
        raise UserError(f"job {job_id} cannot be cancelled: {done.stderr.strip()}")


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not found here. Use a login node of the cluster") from error


def show_log(submission: Submission) -> int:
    """Show what the first rank prints, through restarts, until the job ends; its exit code."""
    position = 0
    while True:
        state = job_state(submission.job_id)  # asked first, so that what was printed before the end is shown
        if submission.log.exists():
            with submission.log.open("rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            print(text.decode(errors="replace"), end="", flush=True)
        if state is None:
            raise UserError(
                f"SLURM has forgotten job {submission.job_id}. See: cosmos-launch status, and {submission.log}"
            )
        if not state.is_active:
            return state.code
        time.sleep(2.0)
