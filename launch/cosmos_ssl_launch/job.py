"""What a cluster runs: one rank of a job. Its state is the run folder's alone."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.common import execute
from cosmos_ssl.config import load_config
from cosmos_ssl.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_LOST,
    EXIT_SAVED,
    EXIT_USER,
    CosmosError,
    StorageError,
    UserError,
    first_line,
)
from cosmos_ssl_launch.probe import show
from cosmos_ssl_launch.requeue import may_restart, newest_checkpoint, note_end, note_start, starts

PATIENCE = 300.0
"""Seconds that a restarted run waits for its folder: of a node that was lost a process, or its lock, may live on for a
while.
"""

GRACE = 3.0
"""Seconds that a rank which has lost another waits before it leaves, so that the one that failed can say so first."""


@dataclass(frozen=True)
class SlurmRank:
    """Trains a resolved config as one rank of a SLURM job; submitit pickles and calls it.

    ``tree``: the config. ``limit``: restarts in a row without a new checkpoint after which the job ends. ``probe``: so
    many steps are measured instead. ``chain``: as one of several jobs, none of which is requeued.
    """

    tree: dict[str, Any]
    limit: int
    probe: int | None = None
    chain: bool = False

    def __call__(self) -> dict[str, float]:
        """Train; the final metrics. Any other end leaves with its exit code.

        srun ends all ranks at the first exit code that is not 0, so after a signal the first rank alone tells it.
        """
        loaded = load_config(self.tree)
        run, first = loaded.config.folder, os.environ["SLURM_PROCID"] == "0"
        requeue = requeue_by_submitit(signal.getsignal(signal.SIGUSR2))

        def leaving(number: int) -> int:
            """Do what is left once all is saved, or before there is anything to save; the process's exit code."""
            if not first:
                return EXIT_DONE
            code = requeue() if number == signal.SIGUSR2 and not self.chain else EXIT_SAVED
            note_end(run, code, "saved on a signal" if code == EXIT_SAVED else "not requeued")
            return code

        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os._exit(leaving(number)))
        prepare_environment()
        metrics: dict[str, float] = {}
        why = ""

        def train() -> int:
            nonlocal why
            if first:
                try:
                    note_start(run)
                except OSError as error:
                    raise StorageError(f"storage failed: {error}") from error
            from cosmos_ssl import build  # after the threads' environment

            if first:
                _wait_for_folder(lambda: build.claim(run))
            build.check(loaded)
            try:
                if self.probe is not None:
                    return show(loaded, self.probe, leaving=leaving)
                metrics.update(build.run(loaded, leaving=leaving))
            except CosmosError as error:
                why = f": {first_line(error)}"
                raise
            finally:  # how it ends is settled; srun sends SIGTERM to all when one rank has left
                for number in (signal.SIGUSR2, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
            return EXIT_DONE

        try:
            code = execute(train)
        except Exception as error:
            note_end(run, EXIT_FAILED, f"rank {os.environ['SLURM_PROCID']}: {type(error).__name__}: {error}")
            raise
        if code in (EXIT_FAILED, EXIT_USER):
            note_end(run, code, f"rank {os.environ['SLURM_PROCID']}{why}")
        if code == EXIT_LOST:
            time.sleep(GRACE)
        if code != EXIT_DONE or not metrics:
            sys.exit(code)
        return metrics

    def checkpoint(self) -> Any:
        """The job that submitit starts again after a time-out or preemption; none where that brings no progress."""
        from submitit.helpers import DelayedSubmission

        run = load_config(self.tree).config.folder
        if self.chain:  # told to leave before ``leaving`` could be called
            note_end(run, EXIT_SAVED, "it had not begun")
            return None
        return DelayedSubmission(self) if may_restart(starts(run), newest_checkpoint(run), self.limit) else None


Job = SlurmRank
"""The name in jobs that an earlier version has queued."""


def requeue_by_submitit(handler: Any) -> Callable[[], int]:
    """Requeue the job by submitit's handler of SIGUSR2, which was in place when the job was called; the exit code."""

    def requeue() -> int:
        from submitit.core.utils import UncompletedJobError

        try:
            if is_requeued_by_slurm(os.environ["SLURM_JOB_ID"]):
                return EXIT_SAVED
            handler(signal.SIGUSR2, None)
        except SystemExit:  # requeued
            return EXIT_SAVED
        except UncompletedJobError:
            print("restarts have brought no new checkpoint, so the job ends here", file=sys.stderr, flush=True)
            return EXIT_FAILED
        except (subprocess.SubprocessError, OSError) as error:
            print(f"the job cannot be requeued: {error}", file=sys.stderr, flush=True)
        return EXIT_LOST

    return requeue


def is_requeued_by_slurm(job_id: str) -> bool:
    """Return whether SLURM preempts this job and will start it again by itself.

    Asked for too, it would start once more after its end. In doubt (preemption by quality of service, whose mode is not
    shown) the answer is no.
    """

    def shown(*what: str) -> dict[str, str]:
        done = subprocess.run(["scontrol", "-o", "show", *what], capture_output=True, text=True, check=True, timeout=60)
        return dict(re.findall(r"(\w+) *= *(\S*)", done.stdout))

    job = shown("job", job_id)
    if job.get("PreemptTime", "None") == "None":
        return False
    by_partition = shown("config").get("PreemptType") == "preempt/partition_prio"
    return by_partition and "REQUEUE" in shown("partition", job["Partition"]).get("PreemptMode", "")


def prepare_environment() -> None:
    """Threads, and where the ranks meet. A restart meets at another port, since the old one may still be taken."""
    from submitit.helpers import TorchDistributedEnvironment

    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as for a run on this machine (launch.py)
    if "SLURM_CPUS_PER_TASK" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    place = TorchDistributedEnvironment()
    with suppress(KeyError):  # a host name that means nothing here; the batch script runs on the first rank's node
        if not _is_known(place.master_addr):
            place.master_addr = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    start = f"{os.environ['SLURM_JOB_ID']} {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    place.master_port = random.Random(start).randint(20_000, 60_000)
    place.export(
        set_cuda_visible_devices=False, overwrite=True
    )  # the device follows from LOCAL_RANK among those that SLURM gave
    os.environ.update(given)


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _wait_for_folder(claim: Callable[[], None]) -> None:
    """Claim the run folder; a restart is patient. Raises UserError."""
    end = time.monotonic() + (PATIENCE if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else 0.0)
    while True:
        try:
            return claim()
        except UserError:
            if time.monotonic() > end:
                raise
        time.sleep(1.0)


def log_file(folder: Path, job_id: str, rank: int = 0) -> Path:
    """The file with what a rank prints, as submitit names it."""
    return folder / f"{job_id}_{rank}_log.out"
