"""The released checkpoints by name: fetched from the Hugging Face hub once, and checked against the hub's hash."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cosmos_ssl.errors import CheckpointError, did_you_mean
from cosmos_ssl.files import written_whole

REPOSITORY = "sankim2/cosmos"
_DATA = ("cc3m", "cc12m", "yfcc15m", "merged30m", "pixelprose")
RELEASED = tuple(f"cosmos_{tower}_{data}" for tower in ("vitb16", "vitb32") for data in _DATA)
"""Names of the released checkpoints; the file of each is ``NAME.pt``."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERIFIED = ".sha256"


def checkpoint_path(checkpoint: str | Path) -> Path:
    """The path that ``checkpoint`` names; of a released name (with or without ``.pt``) that of its file, fetched where
    needed.

    What exists here is never looked for on the hub. Raises CheckpointError as ``fetch_released`` does, and for what
    looks like a released name and is none.
    """
    name = released(checkpoint)
    return Path(checkpoint).expanduser() if name is None else fetch_released(name)


def released(checkpoint: str | Path) -> str | None:
    """The released checkpoint that would be fetched, or None.

    Raises CheckpointError for what looks like the name of one and is none.
    """
    name = str(checkpoint).removesuffix(".pt")
    if Path(checkpoint).expanduser().exists() or "/" in name or os.sep in name or not name.startswith("cosmos_vit"):
        return None
    if name not in RELEASED:
        raise CheckpointError(
            f"no released checkpoint is named '{name}'.{did_you_mean(name, RELEASED)} Released: {', '.join(RELEASED)}"
        )
    return name


def fetch_released(name: str, *, cache_dir: Path | None = None, endpoint: str | None = None) -> Path:
    """The file of a released checkpoint in the hub's cache folder (``HF_HOME``), downloaded with progress where it is
    not there.

    ``HF_ENDPOINT`` names another hub, and is what ``endpoint`` defaults to. The file is hashed once, and fetched again
    if it is not what the hub says. Raises CheckpointError without network (and without the file), and for a file that
    stays damaged.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    file = f"{name}.pt"
    url = hf_hub_url(REPOSITORY, file, endpoint=endpoint or os.environ.get("HF_ENDPOINT") or None)
    where: dict[str, Any] = {
        "repo_id": REPOSITORY,
        "filename": file,
        "cache_dir": cache_dir,
        "endpoint": endpoint or os.environ.get("HF_ENDPOINT"),
    }
    try:
        told = get_hf_file_metadata(url).etag or ""
    except Exception as error:  # the hub's client raises its own errors, its HTTP library's, and OSError
        return _cached(lambda: hf_hub_download(**where, local_files_only=True), _unreachable(name, url, error))
    if not _SHA256.fullmatch(told):
        raise CheckpointError(f"{url}: the hub tells no SHA-256 of this file ('{told}'), so that it cannot be checked")
    for again in (False, True):
        try:
            path = Path(hf_hub_download(**where, force_download=again))
        except Exception as error:
            raise CheckpointError(_unreachable(name, url, error)) from error
        if _verified(path, told):
            return path
    raise CheckpointError(
        f"{path} is not what {url} should hold: its SHA-256 is not {told}, also when fetched again. It is not used"
    )


def _cached(find: Callable[[], str], otherwise: str) -> Path:
    """The file that was fetched before; it was checked then, and is hashed again where it has changed since."""
    try:
        path = Path(find())
    except Exception as error:
        raise CheckpointError(otherwise) from error
    told = path.readlink().name if path.is_symlink() else ""  # the cache names what it stores by what the hub told
    if not _verified(path, told):
        raise CheckpointError(f"{path} is in the cache and damaged (its SHA-256 is not {told or 'known'}). {otherwise}")
    return path


def _unreachable(name: str, url: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return (
        f"{name} is not in the cache and cannot be fetched: {reason}\n"
        f"Without network: download {url} elsewhere, and give the path of the file as the checkpoint"
    )


def _verified(path: Path, told: str) -> bool:
    """Return whether the file's SHA-256 is ``told``; what was found of this size and time is kept beside the
    stored file.
    """
    real = path.resolve()
    mark = real.with_name(real.name + _VERIFIED)
    stamp = f"{real.stat().st_size} {real.stat().st_mtime_ns}"
    try:
        words = mark.read_text().split()
        if " ".join(words[:2]) == stamp:
            return words[2] == told or not told
    except (OSError, IndexError):
        pass
    with real.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError), written_whole(mark) as out:  # a cache that cannot be written: hashed at each use
        out.write(f"{stamp} {found}\n".encode())
    return found == told
