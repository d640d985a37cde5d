"""The ``cosmos-launch`` command: trains what a config says, on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cosmos_ssl.cli.common import DEBUG, execute, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return execute(lambda: _run(arguments), debug=DEBUG in arguments)


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="cosmos-launch",
        description="Train what a config says. The same command again resumes.",
        epilog="key.sub=value arguments override single values of the config, profile.KEY=value those of the profile; "
        "they may stand anywhere. Exit codes: 0 done, 1 failed and would again, 2 the input, 74 storage lost, "
        "75 saved on a signal, 130 Ctrl-C, saved.",
    )
    parser.add_argument("--config", required=True, metavar="X.yaml", help="a file, or the name of a config that comes with cosmos-ssl")
    parser.add_argument("--profile", metavar="P.yaml", help="where to run (default: local, on this machine)")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the resolved config, but do not train")
    parser.set_defaults(overrides=[])
    arguments = parse(parser, argv)

    from cosmos_ssl_launch.launch import launch  # after --help, which needs none of it

    return launch(arguments.config, arguments.overrides, profile=arguments.profile, dry_run=arguments.dry_run)
