"""What the commands on data share: how storage that fails is told, and the flags that several have."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from cosmos_ssl.errors import CosmosError, StorageError

URLS = "shards: paths or fsspec URLs with braces or *, lists joined by ::, list files (.list), a folder of .tar files"


@contextmanager
def storage() -> Iterator[None]:
    """Storage that fails is told in one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CosmosError):
            raise
        raise StorageError(f"data: storage fails: {error}") from error


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that work in several processes."""
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
