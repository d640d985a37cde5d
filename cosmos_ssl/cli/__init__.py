"""The ``cosmos-ssl`` command: a table of commands, each in a file of its own that is imported when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from importlib import import_module

from cosmos_ssl import __version__
from cosmos_ssl.cli.common import DEBUG, execute, parse, stdout_for_reports

COMMANDS = {
    "plugins": "list the parts that are installed, show one, check all",
    "config": "check, show, list or copy configs; JSON Schema for editors",
    "data": "index, check and make training data",
    "runs": "runs side by side: a table, and a page of their curves, configs and pictures",
    "eval": "evaluate a trained or released checkpoint",
    "attend": "pictures of where words look in a picture, and the picture in words",
    "embed": "embeddings of pictures, shards or texts, as Parquet or NumPy",
    "search": "pictures found by words or by pictures, as a page, as JSON, or served to a browser",
    "export": "write a trained model for OpenCLIP, Hugging Face, timm or the official program",
    "checkpoint": "write a checkpoint in several files with one file a role",
    "flops": "FLOPs, parameters and activation memory of a training step, side by side for several configs",
    "info": "versions, devices, attention backends and kernels, for bug reports",
}
"""Command -> what it is for. ``cosmos_ssl.cli.COMMAND`` offers ``add_parser(subparsers)``, which sets ``run``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return execute(lambda: _run(arguments), debug=DEBUG in arguments)


def _run(argv: Sequence[str]) -> int:
    called = next((text for text in argv if not text.startswith("-")), "")
    arguments = parse(command_parser([called]), argv)
    arguments.argv = argv
    with stdout_for_reports(arguments):
        return int(arguments.run(arguments))


def command_parser(called: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser of ``cosmos-ssl``. Only the commands in ``called`` are imported and get their arguments."""
    parser = argparse.ArgumentParser(
        prog="cosmos-ssl",
        description="Parts, configs and data of cosmos-ssl. Training is started by cosmos-launch.",
    )
    parser.add_argument("--version", action="version", version=f"cosmos-ssl {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        if name in called:
            import_module(f"cosmos_ssl.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=purpose)
    return parser
