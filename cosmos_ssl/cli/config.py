"""``cosmos-ssl config``: check, show, list and copy configs, and print their JSON Schema."""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.common import table
from cosmos_ssl.errors import EXIT_DONE, UserError, did_you_mean
from cosmos_ssl.files import storage_faults, written_whole


def add_parser(subparsers: Any) -> None:
    """Add the command and its actions."""
    parser = subparsers.add_parser("config")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("check", help="both stages of checks: keys and names, then options and requirements")
    _add_config(action)
    action.set_defaults(run=_check)

    action = actions.add_parser("show", help="the resolved config as YAML")
    _add_config(action)
    action.add_argument("--origin", action="store_true", help="say where each value was written")
    action.set_defaults(run=_show)

    action = actions.add_parser("schema", help="JSON Schema of configs, with the options of all parts")
    action.set_defaults(run=_schema)

    action = actions.add_parser("list", help="the configs that come with cosmos-ssl")
    action.set_defaults(run=_list)

    action = actions.add_parser("copy", help="copy a config that comes with cosmos-ssl, to change it")
    action.add_argument("name", metavar="NAME", help="as 'config list' prints it")
    action.add_argument("destination", metavar="DEST", nargs="?", type=Path, help="file or folder (default: here)")
    action.set_defaults(run=_copy)


def _add_config(action: argparse.ArgumentParser) -> None:
    action.add_argument("config", metavar="CONFIG", help="a file, or the name of a config that comes with cosmos-ssl")
    action.epilog = "key.sub=value arguments override single values and may stand anywhere."
    action.set_defaults(overrides=[])


def _check(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.config import load_config

    loaded = load_config(arguments.config, arguments.overrides)
    from cosmos_ssl.build import check  # after stage one, which needs no torch

    check(loaded)
    print(f"{loaded.path}: ok")
    return EXIT_DONE


def _show(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.config import load_config
    from cosmos_ssl.config.source import dump_yaml

    loaded = load_config(arguments.config, arguments.overrides)
    print(dump_yaml(loaded.tree, loaded.origin if arguments.origin else None), end="")
    return EXIT_DONE


def _schema(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.config.schema import config_schema

    schema, broken = config_schema()
    for message in broken:
        print(message, file=sys.stderr)
    print(json.dumps(schema, indent=2))
    return EXIT_DONE


def _list(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.config.source import packaged_configs

    rows = [(name, _purpose(path)) for name, path in packaged_configs().items() if "shared" not in Path(name).parts]
    print(table([("NAME", "WHAT"), *rows]), end="")
    return EXIT_DONE


_LABEL = re.compile(r"\w+: ")
"""What ends the description in the comment that a config begins with: ``Command:``, ``Hardware:``."""


def _purpose(path: Path) -> str:
    """The first sentence of the comment that a config begins with."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    lines = (line.lstrip("# ").rstrip() for line in comment)
    text = " ".join([next(lines, ""), *takewhile(lambda line: line and not _LABEL.match(line), lines)])
    return re.split(r"(?<=[.!?]) (?=[A-Z(])", text)[0]


def _copy(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.config.source import copy_text, packaged_configs

    configs = packaged_configs()
    name = arguments.name.removesuffix(".yaml")
    if name not in configs:
        raise UserError(
            f"no config '{name}' comes with cosmos-ssl.{did_you_mean(name, list(configs))} See: cosmos-ssl config list"
        )
    target: Path = arguments.destination or Path()
    if target.is_dir():
        target /= configs[name].name
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already. Give another destination")
    with storage_faults(f"{target} cannot be written"), written_whole(target) as file:
        file.write(copy_text(configs[name]).encode())
    print(target)
    return EXIT_DONE
