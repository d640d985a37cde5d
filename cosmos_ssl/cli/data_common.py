"""What the commands on data share: how storage that fails is told, and the flags that several have."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager

from cosmos_ssl.files import storage_faults

URLS = "shards: paths or fsspec URLs with braces or *, lists joined by ::, list files (.list), a folder of .tar files"


def storage() -> AbstractContextManager[None]:
    """Storage that fails is told in one line."""
    return storage_faults("data: storage fails")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that work in several processes."""
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
