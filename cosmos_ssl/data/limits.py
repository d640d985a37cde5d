"""The machine's limits that batches on their way from the workers run into: shared memory and open files."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from cosmos_ssl.errors import UserError

_FILES_OF_OTHERS = 128
"""Libraries, logs, shards, pipes to the workers: opened later than this is looked at."""


def check_shared_memory(needed: int, folder: Path = Path("/dev/shm")) -> None:
    """Raise UserError where ``needed`` bytes a rank do not fit: writing beyond the end kills the writer without a
    word.
    """
    if not folder.is_dir():  # not Linux
        return
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"loader: batches under way between workers and trainer take up to {_size(needed)} of {folder}, "
            f"which has {_size(free)} free. "
            "Enlarge it (docker run --shm-size=8g), or lower loader.workers or loader.prefetch"
        )


def check_open_files(needed: int) -> None:
    """Lift this process's limit of open files as far as allowed. Raises UserError where ``needed`` more do not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # macOS refuses its own 'unlimited'
            pass
    needed += _open_files() + _FILES_OF_OTHERS
    if soft != resource.RLIM_INFINITY and needed > soft:
        raise UserError(
            f"loader: batches under way between workers and trainer keep up to {needed:,} files open, and the "
            f"limit is {soft:,}. "
            "Raise it (ulimit -n), or lower loader.workers or loader.prefetch"
        )


def _open_files() -> int:
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:  # not Linux
        return 0


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
