"""``cosmos-ssl data``: a file for each command, or for two that belong together.

What they do is in ``cosmos_ssl.data`` and ``cosmos_ssl.shards``, which are imported when a command runs.
"""

from __future__ import annotations

from typing import Any

from cosmos_ssl.cli.data import check, index, look, prepare, scenes, sets


def add_parser(subparsers: Any) -> None:
    """Add the command and its sub-commands."""
    parser = subparsers.add_parser("data", help="index, check and make training data")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (index, check, scenes, prepare, sets, look):
        module.add_parser(commands)
