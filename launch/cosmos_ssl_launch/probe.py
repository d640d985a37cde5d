"""``cosmos-launch --probe N``: a run's first steps, where it would take place, in a folder that is then removed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_ssl.cli.common import table
from cosmos_ssl.errors import EXIT_DONE
from cosmos_ssl_launch.local import PARENT, run_ranks
from cosmos_ssl_launch.profile import Profile, SlurmProfile

if TYPE_CHECKING:
    from cosmos_ssl.config import LoadedConfig

_PROBED = (
    *("evaluators=null", "callbacks=null", "logging.writers=null"),
    *("logging.tensorboard=false", "training.trace_steps=0"),
)
_PATIENCE = 60.0
"""Seconds that a cancelled job has to end."""


def probe(
    config: str, overrides: Sequence[str], run: Path, steps: int, place: Profile, *, started: bool, snapshot: bool
) -> int:
    """Measure ``steps`` of a run that would lie in ``run``, of which nothing is touched; the exit code.

    ``overrides``: of the config alone. ``started``: as one rank of a world that is there already.
    """
    from cosmos_ssl.config import load_config

    if started:
        return _as_rank(config, overrides, run, steps)
    with _folder(run) as folder:
        own = [*overrides, *_PROBED, f"output_dir={folder}"]
        loaded = load_config(config, own)
        if isinstance(place, SlurmProfile):
            return _on_slurm(loaded, place, steps, snapshot=snapshot)
        if place.ranks > 1:
            from cosmos_ssl.build.readiness import make_ready

            make_ready(loaded)
        print(f"probing {steps} steps here, on {place.ranks} rank{'s' * (place.ranks > 1)}", flush=True)
        return run_ranks(["--config", config, "--probe", str(steps), *own], place.ranks, folder)


def show(loaded: LoadedConfig, steps: int, **options: object) -> int:
    """Probe in this process, and let the first rank say what was measured; the exit code."""
    from cosmos_ssl import build

    print(table(build.probe(loaded, steps, **options)), end="", flush=True)  # type: ignore[arg-type]
    return EXIT_DONE


def _as_rank(config: str, overrides: Sequence[str], run: Path, steps: int) -> int:
    """As a rank of ``run_ranks``, which has made a folder; or of others' world, whose first rank removes it."""
    from cosmos_ssl.config import load_config

    if PARENT in os.environ:
        return show(load_config(config, overrides), steps)
    world = os.environ.get("MASTER_PORT") or "{SLURM_JOB_ID}.{SLURM_STEP_ID}".format_map(os.environ)
    folder = run.with_name(f"{run.name}.probe-{world}")
    try:
        return show(load_config(config, [*overrides, *_PROBED, f"output_dir={folder}"]), steps)
    finally:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _folder(run: Path) -> Iterator[Path]:
    """A new folder beside that of the run; it is gone afterwards, whatever happens, with those made above it."""
    made = [above for above in run.absolute().parents if not above.exists()]
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{run.name}.probe-", dir=run.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for above in made:
            with suppress(OSError):
                above.rmdir()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _on_slurm(loaded: LoadedConfig, place: SlurmProfile, steps: int, *, snapshot: bool) -> int:
    """Queue the probe, show what it says, and see that its job has ended."""
    from cosmos_ssl.build.readiness import make_ready
    from cosmos_ssl_launch.slurm import cancel, job_state, show_log, submit
    from cosmos_ssl_launch.snapshot import take_snapshot

    make_ready(loaded, scan=False)
    if snapshot:
        take_snapshot(loaded.config.folder, loaded.tree)
    once = place.model_copy(update={"restarts_without_progress": 0, "chain": None})
    [submission] = submit([loaded], once, snapshot=snapshot, probe=steps)
    print(
        f"probing {steps} steps as job {submission.job_id}, on {place.nodes} x {place.tasks_per_node} ranks", flush=True
    )
    try:
        return show_log(submission)
    finally:
        end = time.monotonic() + _PATIENCE
        while (state := job_state(submission.job_id)) is not None and state.is_active and time.monotonic() < end:
            with suppress(Exception):
                cancel(submission.job_id)
            time.sleep(1.0)
