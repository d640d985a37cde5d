"""The ``cosmos-launch`` command: trains what a config says, on this machine or on a SLURM cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from cosmos_ssl.cli.common import DEBUG, execute, parse
from cosmos_ssl.streams import steady_streams

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
    """What trains."""
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
    _add_place(parser)
    return parser


def _train(argv: Sequence[str]) -> int:
    arguments = parse(train_parser(), argv)

    from cosmos_ssl_launch.launch import launch  # after --help, which needs none of it

    return launch(
        arguments.config,
        arguments.overrides,
        profile=arguments.profile,
        fork=arguments.fork,
        dry_run=arguments.dry_run,
        follow=arguments.follow,
        snapshot=not arguments.no_snapshot,
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Where a run takes place, and how it is watched."""
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
    """``status``, ``resume`` and ``cancel``."""
    parser = argparse.ArgumentParser(prog="cosmos-launch", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("run", type=Path, metavar="RUN_FOLDER")
        if name == "resume":
            _add_place(command)
    return parser


def _on_run(argv: Sequence[str]) -> int:
    arguments = parse(run_parser(), argv)

    from cosmos_ssl_launch import runs

    if arguments.command != "resume":
        return runs.status(arguments.run) if arguments.command == "status" else runs.cancel(arguments.run)
    place = {"profile": arguments.profile, "follow": arguments.follow, "snapshot": not arguments.no_snapshot}
    return runs.resume(arguments.run, arguments.overrides, **place)
