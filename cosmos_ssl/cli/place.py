"""Where a command that ranks can share takes place: ``--profile``, which cosmos-launch carries out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

from cosmos_ssl.cli.common import reports_to_stdout
from cosmos_ssl.errors import UserError

PREFIX = "profile."
VARIABLE = "COSMOS_PROFILE"
LAUNCH = "cosmos_ssl_launch"
"""The group of the entry point by which cosmos-launch offers to carry out a command."""
Launcher = Callable[..., int | None]


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the flags of where a command takes place; its overrides may then be of the profile, too."""
    words = (
        "where to run: a file, or a profile that comes with cosmos-ssl, as for cosmos-launch; profile.KEY=value "
        f"overrides one value, such as profile.nproc=2 for two processes here (default: {VARIABLE}, or here)"
    )
    parser.add_argument("--profile", metavar="P.yaml", help=words)
    parser.add_argument(
        "--follow", action="store_true", help="on a cluster: show the first rank's output until the job ends"
    )
    parser.add_argument(
        "--no-snapshot", action="store_true", help="on a cluster: run the code as it is then, not a copy made now"
    )


def carry_out(
    command: str, arguments: argparse.Namespace, work: Callable[[], int], *, folder: Path, check: Callable[[], None]
) -> int:
    """Do ``work`` here, or have the ranks of the profile do it, each by the same ``arguments.argv``; the exit code.

    A world that is started already is joined, whatever the profile says. ``check`` raises before ranks are started what
    they would all raise. Files of a job on a cluster lie in ``folder``. Raises UserError for a profile that cannot be
    used.
    """
    from cosmos_ssl.config.ranks import started_ranks

    values = [text.removeprefix(PREFIX) for text in arguments.overrides if text.startswith(PREFIX)]
    arguments.overrides = [text for text in arguments.overrides if not text.startswith(PREFIX)]
    profile = arguments.profile or os.environ.get(VARIABLE)
    if started_ranks() > 1 or "WORLD_SIZE" in os.environ or not (profile or values):
        return work()
    launcher = _launcher()
    code = launcher(
        arguments.argv,
        profile or "local",
        values,
        name=f"cosmos-ssl {command}",
        folder=folder,
        to_stdout=reports_to_stdout(arguments),
        checkpoint=arguments.checkpoint,
        check=check,
        follow=arguments.follow,
        snapshot=not arguments.no_snapshot,
    )
    return work() if code is None else code


def _launcher() -> Launcher:
    found = list(entry_points(group=LAUNCH))
    if not found:
        raise UserError("--profile: cosmos-launch, which starts ranks, is not installed. Run: pip install -e .")
    return cast(Launcher, found[0].load())
