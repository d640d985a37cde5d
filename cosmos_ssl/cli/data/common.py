"""What the commands on data share: how storage that fails is told, and the arguments that several have."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from cosmos_ssl.files import storage_faults

T = TypeVar("T")
URLS = "shards: paths or fsspec URLs with braces or *, lists joined by ::, list files (.list), a folder of .tar files"


def storage() -> AbstractContextManager[None]:
    """Storage that fails is told in one line."""
    return storage_faults("data: storage fails")


def add_command(
    commands: Any, name: str, purpose: str, *, folder: bool = False, table: bool = False
) -> argparse.ArgumentParser:
    """A command on shards, or with ``folder`` on a folder of pictures and with ``table`` on tables, too."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=purpose)
    parser.add_argument(
        "urls",
        nargs="+",
        metavar="URLS",
        help=URLS + "; or one folder of pictures" * folder + "; or tables" * table,
    )
    return parser


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that work in several processes."""
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")


def add_max_pixels(parser: argparse.ArgumentParser, what: str) -> None:
    """The flag of commands that decode; ``what`` becomes of larger pictures."""
    help = f"larger pictures are {what} (default: %(default)s)"
    parser.add_argument("--max-pixels", type=int, default=1 << 26, metavar="N", help=help)


def add_continue(parser: argparse.ArgumentParser, what: str) -> None:
    """The flag of commands whose work can be gone on with."""
    parser.add_argument("--continue", dest="resume", action="store_true", help=f"go on with {what}")


def options_of(kind: Callable[..., T], arguments: argparse.Namespace, **others: Any) -> T:
    """An options class of the arguments that bear its fields' names, and ``others``; a process a core by default."""
    from cosmos_ssl.data.scan import cores

    if getattr(arguments, "workers", 0) is None:
        arguments.workers = cores()
    names = [name for name in inspect.signature(kind).parameters if name not in others]
    return kind(**{name: getattr(arguments, name) for name in names}, **others)


def own_schema(urls: list[str]) -> str | None:
    """The caption schema that 'data prepare' noted beside the shards."""
    from cosmos_ssl.data import expand
    from cosmos_ssl.data.table import is_table
    from cosmos_ssl.shards.output import schema_beside

    return None if is_table(urls) else schema_beside(expand(urls)[0])
