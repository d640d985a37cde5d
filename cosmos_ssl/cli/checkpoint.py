"""``cosmos-ssl checkpoint``: checkpoints of runs as files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.common import run_argument
from cosmos_ssl.errors import EXIT_DONE, UserError
from cosmos_ssl.files import storage_faults


def add_parser(subparsers: Any) -> None:
    """Add the command and those below it."""
    parser = subparsers.add_parser("checkpoint")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    merge = commands.add_parser(
        "merge",
        help="write one file a role",
        description="Writes a checkpoint whose roles lie in several files (checkpoints.shards) with one file a role, "
        "into a run folder of its own. Tensors go through memory one by one.",
    )
    merge.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder (its newest), or one of its checkpoints")
    merge.add_argument("--output", type=run_argument, required=True, metavar="DIR", help="a new run folder")
    merge.set_defaults(run=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} is there already, and not empty. Give a new folder")
    from cosmos_ssl.build.weights import find_source
    from cosmos_ssl.engine.merging import merge

    source = find_source(arguments.checkpoint)
    if source.folder is None:
        raise UserError(f"{source} is no checkpoint of a run")
    with storage_faults(f"{output} cannot be written"):
        print(merge(source.folder, output))
    return EXIT_DONE
