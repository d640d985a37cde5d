"""Checks configs, decides where they run, and runs or queues them there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cosmos_ssl.config import LoadedConfig, load_config
from cosmos_ssl.config.ranks import check_ranks, started_ranks
from cosmos_ssl.config.source import dump_yaml
from cosmos_ssl.errors import EXIT_DONE, EXIT_INTERRUPTED, UserError
from cosmos_ssl_launch.local import run_ranks
from cosmos_ssl_launch.profile import LocalProfile, Profile, SlurmProfile, read_profile

PROFILE_VARIABLE = "COSMOS_PROFILE"

_PREFIX = "profile."


def launch(
    configs: Sequence[str],
    overrides: Sequence[str],
    *,
    profile: str | None = None,
    fork: str | None = None,
    dry_run: bool = False,
    follow: bool = False,
    snapshot: bool = True,
) -> int:
    """Train ``configs``, or say what would be done. Returns the exit code; raises UserError for what the user gave."""
    values = [text.removeprefix(_PREFIX) for text in overrides if text.startswith(_PREFIX)]
    own = [text for text in overrides if not text.startswith(_PREFIX)]
    loaded = [load_config(config, own) for config in configs]
    joined = started_ranks()
    started = joined > 1 or "WORLD_SIZE" in os.environ
    names = {profile or one.config.profile or os.environ.get(PROFILE_VARIABLE) or "local" for one in loaded}
    if len(names) > 1:
        raise UserError(f"the configs name several profiles ({', '.join(sorted(names))}). Give one by --profile")
    place: Profile = LocalProfile(kind="local", nproc=joined) if started else read_profile(names.pop(), values)
    if isinstance(place, SlurmProfile) and place.gpus:  # so that a node whose GPUs are not to be seen is found out
        added = [["training.device=cuda"] if one.config.training.device == "auto" else [] for one in loaded]
        loaded = [load_config(config, [*own, *more]) for config, more in zip(configs, added, strict=True)]
    for one in loaded:
        check_ranks(one.config, place.ranks)
    if len(loaded) > 1:
        _check_array(loaded, place)

    # Before torch starts its threads: a short spin between two operations is quick, while GNU OpenMP's long one slows
    # a run many times over wherever anything else uses the processors
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from cosmos_ssl import build  # after stage one, which needs no torch

    for one in loaded:
        build.check(one)
    if isinstance(place, SlurmProfile):
        return _on_slurm(loaded, place, fork=fork, dry_run=dry_run, follow=follow, snapshot=snapshot)
    return _here(configs[0], overrides, loaded[0], place.ranks, joined, fork=fork, dry_run=dry_run)


def _here(
    config: str,
    overrides: Sequence[str],
    loaded: LoadedConfig,
    ranks: int,
    joined: int,
    *,
    fork: str | None,
    dry_run: bool,
) -> int:
    """Train in this process or in several of this machine."""
    from cosmos_ssl import build
    from cosmos_ssl.build import start as build_start

    where = "in one process" if ranks == 1 else f"as one of {ranks} ranks" if joined > 1 else f"in {ranks} processes"
    if dry_run:
        left = build_start.dry_run(loaded, here=True, fork=fork)
        print(dump_yaml(loaded.tree), end="")
        print(f"{_passed(left)} this trains here, {where}, into {loaded.config.folder}")
        return EXIT_DONE
    if joined == 1 and ranks > 1:
        build_start.prepare(loaded, fork=fork)
    if joined == 1 or os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0":
        print(f"training here, {where}, into {loaded.config.folder}", flush=True)
    if joined == 1 and ranks > 1:
        return run_ranks(["--config", config, *overrides], ranks)
    build.run(loaded, fork=fork)
    return EXIT_DONE


def _passed(left: str) -> str:
    return f"# all checks passed{f' (not looked into: {left})' if left else ''}. Without --dry-run"


def _check_array(loaded: Sequence[LoadedConfig], place: Profile) -> None:
    """Several configs at once: only as an array, each with a run folder of its own."""
    if not isinstance(place, SlurmProfile):
        raise UserError(
            "several configs are queued as a job array, which needs a profile for SLURM. Here they train one "
            "after the other"
        )
    folders = [one.config.folder.absolute() for one in loaded]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise UserError(
            f"output_dir: {twice} would be the run folder of several configs. Leave output_dir out, and names differ"
        )


def _on_slurm(
    loaded: Sequence[LoadedConfig],
    place: SlurmProfile,
    *,
    fork: str | None,
    dry_run: bool,
    follow: bool,
    snapshot: bool,
) -> int:
    """Queue one run, or several as an array, once all that can be checked here has been."""
    from cosmos_ssl.build import start as build_start
    from cosmos_ssl_launch import slurm
    from cosmos_ssl_launch.snapshot import drop_snapshot, take_snapshot

    if dry_run:
        left = {build_start.dry_run(one, here=False, fork=fork) for one in loaded} - {""}
        for one in loaded:
            print(f"# the config of {one.config.folder}\n{dump_yaml(one.tree)}")
        script = slurm.batch_script(loaded, place, snapshot=snapshot)
        print(f"{_passed('; '.join(sorted(left)))} this is given to sbatch:\n{script}", end="")
        return EXIT_DONE
    if follow and len(loaded) > 1:
        raise UserError(
            "--follow shows one run; these are several. Leave it out, and see: cosmos-launch status RUN_FOLDER"
        )
    for one in loaded:
        check_not_queued(one.config.folder)
        build_start.prepare(one, scan=False, fork=fork)
    for one in loaded:
        if snapshot:
            take_snapshot(one.config.folder, one.tree)
        else:
            drop_snapshot(one.config.folder)
    submissions = slurm.submit(loaded, place, snapshot=snapshot)
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
        return slurm.follow(submissions[0], _show)
    except KeyboardInterrupt:
        print(
            f"job {submissions[0].job_id} goes on. To end it: cosmos-launch cancel {loaded[0].config.folder}",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def check_not_queued(run: Path) -> None:
    """Raise UserError where a job of this run folder waits or runs."""
    from cosmos_ssl_launch.slurm import Submission, job_state

    submission = Submission.of(run)
    state = None if submission is None else job_state(submission.job_id)
    if submission is not None and state is not None and state.is_active:
        raise UserError(
            f"run folder {run} has job {submission.job_id} ({state.name}). End it first: cosmos-launch cancel {run}"
        )
