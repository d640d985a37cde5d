"""What is fetched from the Hugging Face hub: the released checkpoints by name, checked against the hub's hash, and the
files of a repository.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cosmos_ssl.errors import CheckpointError, did_you_mean, listed
from cosmos_ssl.files import run_path, written_whole

REPOSITORY = "sankim2/cosmos"
_DATA = ("cc3m", "cc12m", "yfcc15m", "merged30m", "pixelprose")
RELEASED = tuple(f"cosmos_{tower}_{data}" for tower in ("vitb16", "vitb32") for data in _DATA)
"""Names of the released checkpoints; the file of each is ``NAME.pt``."""

HUB = "hf-hub:"
"""Before ``ORG/NAME``, or ``ORG/NAME@REVISION``."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERIFIED = ".sha256"


def checkpoint_path(checkpoint: str | Path) -> Path:
    """The path that ``checkpoint`` names; of a released name (with or without ``.pt``) that of its file, fetched where
    needed.

    What exists here is never looked for on the hub. Raises CheckpointError as ``fetch_released`` and ``run_path`` do,
    and for what looks like a released name and is none.
    """
    name = released(checkpoint)
    return run_path(checkpoint) if name is None else fetch_released(name)


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


def fetch_repository(name: str, choose: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """The folder of a repository, ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION``, in the hub's cache.

    Of its files, those are fetched that ``choose`` takes of all their names.

    Without network what was fetched before serves. Raises CheckpointError, also where nothing is chosen.
    """
    from huggingface_hub import HfApi

    repository, _, revision = name.removeprefix(HUB).partition("@")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    which: dict[str, Any] = {"repo_id": repository, "revision": revision or "main"}
    try:
        files = [file.rfilename for file in api.model_info(**which).siblings or ()]
    except Exception as error:  # the hub's client raises its own errors, its HTTP library's, and OSError
        folder = _fetched_before(name, which, error)
        if choose([path.name for path in folder.iterdir()]):
            return folder
        raise CheckpointError(_not_fetched(name, error)) from error
    chosen = choose(files)
    if not chosen:
        raise CheckpointError(f"{name} holds no model that can be read: {listed(files, limit=8) or 'it is empty'}")
    try:
        return Path(api.snapshot_download(**which, allow_patterns=list(chosen)))
    except Exception as error:
        raise CheckpointError(_not_fetched(name, error)) from error


def _fetched_before(name: str, which: Mapping[str, Any], error: Exception) -> Path:
    """The folder of a repository as far as it was fetched, where the hub does not answer. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    if status_of(error) is None:  # the hub did not answer
        with suppress(Exception):
            return Path(snapshot_download(**which, allow_patterns=[], local_files_only=True))
    raise CheckpointError(_not_fetched(name, error)) from error


def _not_fetched(name: str, error: Exception) -> str:
    if status_of(error) in (401, 403, 404):
        return (
            f"{name} cannot be fetched: the hub has no such repository or revision, or not for you. A private one "
            "needs hf auth login, or HF_TOKEN"
        )
    return f"{name} cannot be fetched: {reason(error)}. Reach the hub once, or give a folder"


def status_of(error: Exception) -> int | None:
    """The status by which the hub refused; None where it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason(error: Exception) -> str:
    """Of what an error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__


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
    return (
        f"{name} is not in the cache and cannot be fetched: {reason(error)}\n"
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
