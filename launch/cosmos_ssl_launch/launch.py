"""``cosmos-launch``: reads its arguments, checks configs, decides where they run, and runs or queues them there."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_ssl.cli.common import DEBUG, execute, parse, run_argument
from cosmos_ssl.errors import EXIT_DONE, UserError
from cosmos_ssl.streams import steady_streams
from cosmos_ssl_launch.local import run_ranks

if TYPE_CHECKING:  # what the command needs beyond --help is imported when it runs
    from cosmos_ssl.config import LoadedConfig
    from cosmos_ssl_launch.profile import Profile

PROFILE_VARIABLE = "COSMOS_PROFILE"

_PREFIX = "profile."
_EPILOG = (
    "key.sub=value arguments override single values of the config, profile.KEY=value those of the profile; "
    "they may stand anywhere. Exit codes: 0 done, 1 failed and would again, 2 the input, 74 a rank, node or "
    "storage lost, "
    "75 saved on a signal, 130 Ctrl-C, saved."
)
_DRY_RUN = "--dry-run"
_COMMANDS = {
    "status": "say where a run stands",
    "resume": "go on with a run that stands still",
    "cancel": "end the job of a run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or run a command on a run folder; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run = _on_run if arguments[:1] and arguments[0] in _COMMANDS else _train
    with (
        nullcontext() if _DRY_RUN in arguments else steady_streams()
    ):  # a run goes on when its reader has gone (``| head``)
        return execute(lambda: run(arguments), debug=DEBUG in arguments)


def train_parser() -> argparse.ArgumentParser:
    """The parser of the command that trains."""
    parser = argparse.ArgumentParser(
        prog="cosmos-launch",
        description="Train what a config says, here or on a cluster. The same command again resumes.",
        epilog=f"Commands on a run folder: cosmos-launch {'|'.join(_COMMANDS)} RUN_FOLDER. {_EPILOG}",
    )
    parser.add_argument(
        "--config",
        required=True,
        nargs="+",
        action="extend",
        metavar="X.yaml",
        help="a file, or the name of a config that comes with cosmos-ssl; several are queued as a job array",
    )
    parser.add_argument(
        "--fork",
        metavar="OLD",
        help="go on from this run folder, or one of its checkpoints, in another output_dir: weights, optimiser "
        "and step are taken over",
    )
    parser.add_argument(
        _DRY_RUN,
        action="store_true",
        help="check all that a start would, print config and batch script, and train and write nothing",
    )
    parser.add_argument(
        "--probe",
        type=int,
        metavar="N",
        help="measure N steps there instead, in a folder that is removed: samples/s, memory, hours of the whole run",
    )
    _add_place(parser)
    return parser


def _train(argv: Sequence[str]) -> int:
    arguments = parse(train_parser(), argv)
    return launch(
        arguments.config,
        arguments.overrides,
        profile=arguments.profile,
        fork=arguments.fork,
        dry_run=arguments.dry_run,
        probe=arguments.probe,
        follow=arguments.follow,
        snapshot=not arguments.no_snapshot,
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a run takes place, and how it is watched."""
    parser.add_argument(
        "--profile",
        metavar="P.yaml",
        help="where to run: a file, or a profile that comes with cosmos-ssl (default: `profile` of the config, "
        "COSMOS_PROFILE, or here)",
    )
    parser.add_argument(
        "--follow", action="store_true", help="on a cluster: show the first rank's output until the job ends"
    )
    parser.add_argument(
        "--no-snapshot", action="store_true", help="on a cluster: run the code as it is then, not a copy made now"
    )
    parser.set_defaults(overrides=[])


def run_parser() -> argparse.ArgumentParser:
    """The parser of ``status``, ``resume`` and ``cancel``."""
    parser = argparse.ArgumentParser(prog="cosmos-launch", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("run", type=run_argument, metavar="RUN_FOLDER")
        if name == "resume":
            _add_place(command)
    return parser


def _on_run(argv: Sequence[str]) -> int:
    arguments = parse(run_parser(), argv)

    from cosmos_ssl_launch import commands

    if arguments.command != "resume":
        return commands.status(arguments.run) if arguments.command == "status" else commands.cancel(arguments.run)
    place = {"profile": arguments.profile, "follow": arguments.follow, "snapshot": not arguments.no_snapshot}
    return resume(arguments.run, arguments.overrides, **place)


# ---------------------------------------------------------------------------- training


def launch(
    configs: Sequence[str],
    overrides: Sequence[str],
    *,
    profile: str | None = None,
    fork: str | None = None,
    dry_run: bool = False,
    probe: int | None = None,
    follow: bool = False,
    snapshot: bool = True,
) -> int:
    """Train ``configs``, or say what would be done, or measure the first ``probe`` steps. Returns the exit code; raises
    UserError for what the user gave.
    """
    from cosmos_ssl.config import load_config
    from cosmos_ssl.config.ranks import check_ranks, started_ranks
    from cosmos_ssl_launch.profile import LocalProfile, SlurmProfile, read_profile

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
    if probe is not None and (probe < 2 or len(loaded) > 1 or dry_run or fork is not None):
        raise UserError(
            "--probe N measures N steps, 2 or more, of one config; it goes with neither --fork nor --dry-run"
        )

    # Before torch starts its threads: a short spin between two operations is quick, while GNU OpenMP's long one slows
    # a run many times over wherever anything else uses the processors
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from cosmos_ssl import build  # after stage one, which needs no torch
    from cosmos_ssl.build import readiness

    for one in loaded:
        build.check(one)
    if probe is not None:
        from cosmos_ssl_launch.probe import probe as run_probe

        options = {"started": started, "snapshot": snapshot}
        return run_probe(configs[0], own, loaded[0].config.folder, probe, place, **options)
    ranks = place.ranks
    where = "in one process" if ranks == 1 else f"as one of {ranks} ranks" if joined > 1 else f"in {ranks} processes"
    if dry_run:
        return _dry_run(loaded, place, where, fork=fork, snapshot=snapshot)
    if isinstance(place, SlurmProfile):
        from cosmos_ssl_launch.slurm import queue

        return queue(loaded, place, fork=fork, follow=follow, snapshot=snapshot)
    starts = joined == 1 and ranks > 1
    if starts:
        readiness.make_ready(loaded[0], fork=fork)
    if joined == 1 or os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0":
        print(f"training here, {where}, into {loaded[0].config.folder}", flush=True)
    if starts:
        return run_ranks(["--config", configs[0], *overrides], ranks, loaded[0].config.folder)
    build.run(loaded[0], fork=fork)
    return EXIT_DONE


def _check_array(loaded: Sequence[LoadedConfig], place: Profile) -> None:
    """Several configs at once: only as an array, each with a run folder of its own."""
    if place.kind != "slurm":
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


def _dry_run(loaded: Sequence[LoadedConfig], place: Profile, where: str, *, fork: str | None, snapshot: bool) -> int:
    """Check all that a start would, and print the configs and what would be done with them."""
    from cosmos_ssl.build import readiness
    from cosmos_ssl.config.source import dump_yaml
    from cosmos_ssl_launch.slurm import batch_script

    left = {readiness.dry_run(one, here=place.kind == "local", ranks=place.ranks, fork=fork) for one in loaded} - {""}
    for one in loaded:
        print(f"# the config of {one.config.folder}\n{dump_yaml(one.tree)}")
    unseen = f" (not looked into: {'; '.join(sorted(left))})" if left else ""
    print(f"# all checks passed{unseen}. Without --dry-run ", end="")
    if place.kind == "local":
        print(f"this trains here, {where}, into {loaded[0].config.folder}")
    else:
        times = (
            "" if place.chain is None else f" {place.chain} times, with --dependency=afterany:JOB from the second on"
        )
        print(f"this is given to sbatch{times}:\n{batch_script(loaded, place, snapshot=snapshot)}", end="")
    return EXIT_DONE


def resume(
    run: Path, overrides: Sequence[str], *, profile: str | None = None, follow: bool = False, snapshot: bool = True
) -> int:
    """Go on where a run stands: with its config, and where it ran before unless ``profile`` says otherwise."""
    from tempfile import TemporaryDirectory

    from cosmos_ssl.config.source import dump_yaml
    from cosmos_ssl.files import QUEUED_CONFIG
    from cosmos_ssl_launch.commands import check_run
    from cosmos_ssl_launch.slurm import Submission, check_not_queued

    check_run(run)
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
