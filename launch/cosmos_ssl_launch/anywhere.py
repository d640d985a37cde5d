"""Commands of ``cosmos-ssl`` that ranks can share, where a profile says: ``--profile`` of embed and eval."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cosmos_ssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LOST, EXIT_SAVED, EXIT_USER, UserError
from cosmos_ssl.files import storage_faults
from cosmos_ssl_launch.job import GRACE, prepare_environment, requeue_by_submitit
from cosmos_ssl_launch.local import run_ranks
from cosmos_ssl_launch.profile import SlurmProfile, read_profile
from cosmos_ssl_launch.requeue import STARTS, note_end, note_start
from cosmos_ssl_launch.slurm import Submission, executor_of, give, job_state, show_log, submission_folder
from cosmos_ssl_launch.snapshot import drop_snapshot, take_snapshot


@dataclass(frozen=True)
class CommandRank:
    """Runs a command of ``cosmos-ssl`` as one rank of a SLURM job; submitit pickles and calls it.

    What it computes is kept by the command itself at any instant, so that a signal needs no other saving. ``folder``
    gets the job's notes.
    """

    argv: Sequence[str]
    folder: Path

    def __call__(self) -> int:
        """Run it; any end but a good one leaves with its exit code (as ``SlurmRank``)."""
        first = os.environ["SLURM_PROCID"] == "0"
        requeue = requeue_by_submitit(signal.getsignal(signal.SIGUSR2))

        def leave(number: int, frame: FrameType | None) -> None:
            code = EXIT_SAVED if first else EXIT_DONE
            if first and number == signal.SIGUSR2:
                (self.folder / STARTS).unlink(missing_ok=True)  # it has worked until its time was up
                code = requeue()
            if first:
                note_end(self.folder, code, "ended by a signal" if code == EXIT_SAVED else "not requeued")
            os._exit(code)

        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, leave)
        prepare_environment()
        if first:
            note_start(self.folder)
        from cosmos_ssl.cli import main  # after the threads' environment

        try:
            code = main(self.argv)
        except Exception as error:
            note_end(self.folder, EXIT_FAILED, f"rank {os.environ['SLURM_PROCID']}: {type(error).__name__}: {error}")
            raise
        finally:  # how it ends is settled; srun sends SIGTERM to all when one rank has left
            for number in (signal.SIGUSR2, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        if code in (EXIT_FAILED, EXIT_USER):
            note_end(self.folder, code, f"rank {os.environ['SLURM_PROCID']}")
        if code == EXIT_LOST:
            time.sleep(GRACE)
        if code != EXIT_DONE:
            sys.exit(code)
        return code

    def checkpoint(self) -> Any:
        """The job that submitit starts again after a time-out or preemption."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def carry_out(
    argv: Sequence[str],
    profile: str,
    values: Sequence[str],
    *,
    name: str,
    folder: Path,
    checkpoint: str,
    to_stdout: bool = False,
    check: Callable[[], None],
    follow: bool,
    snapshot: bool,
) -> int | None:
    """Have ``cosmos-ssl`` with ``argv`` done by the ranks of a profile, with ``KEY=value`` over it; the exit code.

    None where this process is the only rank. On a cluster it is queued as ``name``, with its files, and a copy of the
    code and of the parts of the run that ``checkpoint`` belongs to, in ``folder``. ``to_stdout``: the command writes a
    report to standard output. Raises UserError, and what ``check`` raises, before anything is started.
    """
    place = read_profile(profile, values)
    if place.ranks == 1 and not isinstance(place, SlurmProfile):
        return None
    if isinstance(place, SlurmProfile) and place.chain is not None:
        raise UserError("profile.chain is of training: what is embedded or evaluated stays, so give the command again")
    if isinstance(place, SlurmProfile) and to_stdout:
        raise UserError("--json -: a job on a cluster has no standard output here. Give a file")
    check()
    if not isinstance(place, SlurmProfile):
        return run_ranks(argv, place.ranks, folder, "cosmos_ssl.cli")
    folder = folder.absolute()
    before = Submission.of(folder)
    state = None if before is None else job_state(before.job_id)
    if before is not None and state is not None and state.is_active:
        raise UserError(f"{folder} has job {before.job_id} ({state.name}). End it first: scancel {before.job_id}")
    with storage_faults(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STARTS).unlink(missing_ok=True)
        take_snapshot(folder, _config_of(checkpoint)) if snapshot else drop_snapshot(folder)
        logs = submission_folder([folder])
        [job_id] = give(
            executor_of([folder], [name.replace(" ", "-")], place, logs, snapshot=snapshot),
            [CommandRank(tuple(argv), folder)],
        )
        submission = Submission(job_id, logs, place.model_dump())
        submission.record(folder)
    print(f"queued {name} as job {job_id}, on {place.nodes} x {place.tasks_per_node} ranks")
    print(f"  log     {submission.log}\n  follow  tail -F {submission.log}\n  end     scancel {job_id}", flush=True)
    if not follow:
        return EXIT_DONE
    try:
        return show_log(submission)
    except KeyboardInterrupt:
        print(f"job {job_id} goes on. To end it: scancel {job_id}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _config_of(checkpoint: str) -> Mapping[str, Any]:
    """The config of the run that a checkpoint lies in, whose parts may be of packages that change; else nothing."""
    from cosmos_ssl.config import load_config

    path = Path(checkpoint).expanduser()
    found = next((own for folder in (path, *path.parents[:2]) if (own := folder / "config.yaml").is_file()), None)
    return {} if found is None else load_config(found, reading=True).tree
