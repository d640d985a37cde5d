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
from cosmos_ssl.files import QUEUED_CONFIG, read_object
from cosmos_ssl_launch.job import SlurmRank, log_file
from cosmos_ssl_launch.profile import SlurmProfile
from cosmos_ssl_launch.requeue import OVER, STARTS, after_link, after_srun, before_link, before_srun
from cosmos_ssl_launch.snapshot import CODE, drop_snapshot, take_snapshot

SUBMISSION = "slurm/submission.json"
"""In the run folder: the job, the folder of its logs, the profile."""

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
    """A job of one run: its id (``12_0`` in an array), the folder of its logs, the profile; in a chain the first of its
    ``jobs``.
    """

    job_id: str
    folder: Path
    profile: Mapping[str, Any]
    followers: tuple[str, ...] = ()
    """The other jobs of its chain, each of which waits for the one before."""

    @property
    def jobs(self) -> tuple[str, ...]:
        """The ids of all jobs of the run, in their order."""
        return (self.job_id, *self.followers)

    @property
    def log(self) -> Path:
        """The file with what the first rank of the first job prints."""
        return log_file(self.folder, self.job_id)

    @classmethod
    def of(cls, run: Path) -> Submission | None:
        """The last job of a run folder, or None."""
        path = run / SUBMISSION
        if not path.exists():
            return None
        advice = "It tells the run's job: see that none is queued (squeue), and delete it"
        found = read_object(path, {"job": str, "folder": str, "profile": dict}, advice)
        return cls(found["job"], Path(found["folder"]), found["profile"], tuple(found.get("followers", ())))

    def record(self, run: Path) -> None:
        """Leave a note of it in the run folder."""
        path = run / SUBMISSION
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "job": self.job_id,
                    "followers": self.followers,
                    "folder": str(self.folder),
                    "profile": dict(self.profile),
                },
                indent=1,
            )
            + "\n"
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
        chained = f", a chain with {', '.join(submission.followers)}" if submission.followers else ""
        print(
            f"queued as job {submission.job_id}{chained}, on {place.nodes} x {place.tasks_per_node} ranks, into "
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
        jobs = ", ".join(submissions[0].jobs)
        print(f"job {jobs} goes on. To end it: cosmos-launch cancel {loaded[0].config.folder}", file=sys.stderr)
        return EXIT_INTERRUPTED


def check_not_queued(run: Path) -> None:
    """Raise UserError where a job of this run folder waits or runs."""
    submission = Submission.of(run)
    for job, state in active_jobs(submission) if submission is not None else ():
        raise UserError(f"run folder {run} has job {job} ({state.name}). End it first: cosmos-launch cancel {run}")


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
    if profile.chain is not None and len(loaded) > 1:
        return "\n".join(batch_script([one], profile, snapshot=snapshot) for one in loaded)
    executor = _executor(loaded, profile, submission_folder([one.config.folder for one in loaded]), snapshot=snapshot)
    if len(loaded) > 1:
        executor.parameters["map_count"] = len(loaded)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(
    loaded: Sequence[LoadedConfig], profile: SlurmProfile, *, snapshot: bool, probe: int | None = None
) -> list[Submission]:
    """Queue the runs, several as one array, or so many steps of them; each as a chain where the profile says so.

    Raises UserError where SLURM is not there or refuses.
    """
    if profile.chain is not None:
        return [_submit_chain(one, profile, profile.chain, snapshot=snapshot) for one in loaded]
    folder = submission_folder([one.config.folder for one in loaded])
    executor = _executor(loaded, profile, folder, snapshot=snapshot)
    jobs = give(executor, [SlurmRank(one.tree, profile.restarts_without_progress, probe) for one in loaded])
    found = [Submission(job, folder, profile.model_dump()) for job in jobs]
    for one, submission in zip(loaded, found, strict=True):
        _record(submission, one)
    return found


def _submit_chain(loaded: LoadedConfig, profile: SlurmProfile, count: int, *, snapshot: bool) -> Submission:
    """Queue one run as so many jobs, all or none of them. Raises UserError."""
    run = loaded.config.folder
    folder = submission_folder([run])
    for name in (STARTS, OVER):  # of an earlier chain
        (run / name).unlink(missing_ok=True)
    jobs: list[str] = []
    try:
        while len(jobs) < count:
            after = f"afterany:{jobs[-1]}" if jobs else None
            executor = _executor([loaded], profile, folder, snapshot=snapshot, after=after)
            jobs += give(executor, [SlurmRank(loaded.tree, profile.restarts_without_progress, chain=True)])
            _record(Submission(jobs[0], folder, profile.model_dump(), tuple(jobs[1:])), loaded)
    except BaseException as error:
        if jobs:
            cancel(*jobs)
        if isinstance(error, UserError) and jobs:
            told = f"{error} (job {len(jobs) + 1} of profile.chain={count}; those before it are cancelled)"
            raise UserError(told) from error
        raise
    return Submission(jobs[0], folder, profile.model_dump(), tuple(jobs[1:]))


def _record(submission: Submission, loaded: LoadedConfig) -> None:
    submission.record(loaded.config.folder)
    (loaded.config.folder / QUEUED_CONFIG).write_text(dump_yaml(loaded.tree), encoding="utf-8")


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


def _executor(
    loaded: Sequence[LoadedConfig], profile: SlurmProfile, folder: Path, *, snapshot: bool, after: str | None = None
) -> Any:
    """Submitit's executor for these runs; ``after``: what a job of a chain waits for."""
    names = [one.config.name for one in loaded]
    return executor_of([one.config.folder for one in loaded], names, profile, folder, snapshot=snapshot, after=after)


def executor_of(
    runs: Sequence[Path],
    names: Sequence[str],
    profile: SlurmProfile,
    folder: Path,
    *,
    snapshot: bool,
    after: str | None = None,
) -> Any:
    """Submitit's executor for jobs of these names that belong to these folders; ``folder`` gets scripts and logs.

    ``after``: the dependency of a job of a chain.
    """
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]
        """Also where there is no srun: a dry run needs none."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    limit, chained = profile.restarts_without_progress, profile.chain is not None
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
        setup=[*before_srun(runs), *(before_link(limit) if chained else ()), *_set_up(profile, snapshot)],
        teardown=after_link() if chained else after_srun(limit),
        srun_args=[*srun_args, *profile.srun_args],
        additional_parameters={
            "no-requeue" if chained else "requeue": True,
            **{name: value for name, value in profile.slurm.items() if value is not False},
            **({} if after is None else {"dependency": after}),
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


def active_jobs(submission: Submission) -> list[tuple[str, JobState]]:
    """The jobs of a run that wait or run, in their order, with their states. Raises UserError."""
    found = [(job, job_state(job)) for job in submission.jobs]
    return [(job, state) for job, state in found if state is not None and state.is_active]


def parse_state(text: str) -> JobState:
    """The first line of what ``scontrol -o show job`` prints."""
    values = dict(re.findall(r"(\w+)=(\S*)", text.partition("\n")[0]))
    code, _, number = values.get("ExitCode", "0:0").partition(":")
    return JobState(
        values["JobState"], values.get("Reason", ""), int(code), int(number or 0), int(values.get("Restarts", 0))
    )


def cancel(*jobs: str) -> None:
    """End a job, or those of a chain, the last first: none starts that is cancelled. Raises UserError where SLURM
    refuses.
    """
    done = _slurm("scancel", *reversed(jobs))
    if done.returncode:
        raise UserError(f"job {' and '.join(jobs)} cannot be cancelled: {done.stderr.strip()}")


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not found here. Use a login node of the cluster") from error


def show_log(submission: Submission) -> int:
    """Show what the first rank prints, through restarts, until the job ends, in a chain the one that the others find
    nothing left to do after; its exit code.
    """
    code = EXIT_DONE
    for number, job in enumerate(submission.jobs):
        code = _show_one(job, log_file(submission.folder, job))
        if len(submission.jobs) > 1 and (submission.folder / Path(OVER).name).exists():
            break
        if submission.jobs[number + 1 :]:
            print(f"job {job} of the chain has ended, the next is {submission.jobs[number + 1]}", flush=True)
    return code


def _show_one(job: str, log: Path) -> int:
    position = 0
    while True:
        state = job_state(job)  # asked first, so that what was printed before the end is shown
        if log.exists():
            with log.open("rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            print(text.decode(errors="replace"), end="", flush=True)
        if state is None:
            raise UserError(f"SLURM has forgotten job {job}. See: cosmos-launch status, and {log}")
        if not state.is_active:
            return state.code
        time.sleep(2.0)
