"""Files that are there whole or not at all, those of a run's folder among them, and what it means where they cannot be
read or written.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from cosmos_ssl.errors import CheckpointError, CosmosError, StorageError, UserError

_REFUSED = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES",
        "EPERM",
        "EROFS",
        "ENOENT",
        "ENOTDIR",
        "EISDIR",
        "EEXIST",
        "ENOTEMPTY",
        "ENAMETOOLONG",
        "ELOOP",
        "EINVAL",
    )
)
"""What another path or other permissions would mend (exit code 2); all else (a full disk, a server that is gone) is
lost storage (74).
"""


def storage_error(error: OSError, what: str) -> CosmosError:
    """The error to tell a user, behind ``what`` failed: UserError where another place or permissions would do, else
    StorageError.
    """
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    place = f" ({name})" if name and name not in what else ""
    kind = UserError if error.errno in _REFUSED else StorageError
    return kind(f"{what}: {error.strerror or str(error) or type(error).__name__}{place}")


def folder_fault(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which need not be there yet; None where something can, as far as can be
    told without making it. Raises OSError for a path that the system refuses.
    """
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not above.is_dir():
        return f"{above} is no folder"
    return None if os.access(above, os.W_OK | os.X_OK) else "Permission denied"


_SEAL = 16
"""Bytes of the hash that a sealed file ends by."""


@contextmanager
def storage_faults(what: str) -> Iterator[None]:
    """Raise what the system refuses meanwhile as ``storage_error`` of ``what``, such as ``--output DIR cannot be
    written``.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, what) from error


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write ``path`` into: under a temporary name beside it until it is whole and on the disk.

    What stood there stays until then; a link is replaced, not followed. Raises OSError, also where a device or a pipe
    stands there.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "is no regular file", str(path))
    part = part_name(path.parent)
    try:
        file = part.open("x+b")
    except OSError as error:
        error.filename = str(path)  # the name that people know
        raise
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def seal(file: IO[bytes]) -> None:
    """End a file that is being written by a hash of all that stands in it."""
    digest = _digest(file, file.seek(0, os.SEEK_END))
    file.write(digest)


def check_seal(path: Path) -> None:
    """Raise ValueError unless a file ends by the hash of what stands in it, OSError where it cannot be read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) - _SEAL
        if size < 0 or _digest(file, size) != file.read(_SEAL):
            raise ValueError(f"{path} is damaged")


def _digest(file: IO[bytes], size: int) -> bytes:
    file.seek(0)
    found = blake2b(digest_size=_SEAL)
    while size and (chunk := file.read(min(size, 1 << 22))):
        found.update(chunk)
        size -= len(chunk)
    return found.digest()


def part_name(folder: Path) -> Path:
    """A name for a file that is not whole.

    It is opened as any file, so that it is for whom the umask says (tempfile's are not).
    """
    return folder / f"tmp{secrets.token_hex(8)}.part"


class LineFile:
    """A file that whole lines are appended to. On a full disk lines wait in memory, and the file keeps whole ones."""

    def __init__(self, path: Path) -> None:
        """Open or make it. Raises OSError, as all that follows."""
        self.path = path
        self._waiting = b""
        self._open()

    def _open(self) -> None:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._handle).st_size

    def lines(self) -> list[bytes]:
        """The lines that are there, without what a crash cut off."""
        return [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def cut(self, keep: Callable[[bytes], bool]) -> None:
        """Drop the lines that ``keep`` does not hold for or fails on (ValueError, IndexError), and half a line."""

        def kept(line: bytes) -> bool:
            try:
                return keep(line)
            except (ValueError, IndexError):
                return False

        left = list(filter(kept, self.lines()))
        self._waiting = b"".join(line for line in self._waiting.splitlines(keepends=True) if kept(line))
        os.close(self._handle)
        with written_whole(self.path) as file:
            file.writelines(left)
        self._open()

    def append(self, line: bytes) -> None:
        """Write a line, which ends by a line end, and those that wait."""
        self._waiting += line
        self._flush()

    def sync(self) -> None:
        """Flush to the disk."""
        self._flush()
        os.fsync(self._handle)

    def close(self) -> None:
        """Flush and close."""
        try:
            self.sync()
        finally:
            os.close(self._handle)

    def _flush(self) -> None:
        try:
            done = os.write(self._handle, self._waiting)
            if done < len(self._waiting):
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            os.ftruncate(self._handle, self._size)
            raise
        self._size += done
        self._waiting = b""


# ---------------------------------------------------------------------------- a run's folder


def read_object(path: Path, keys: Mapping[str, type], advice: str) -> dict[str, Any]:
    """The object in a JSON file, which has ``keys`` of these types.

    Raises UserError, which ends with ``advice``, where a crash, a full disk or a hand has damaged the file; OSError
    where storage fails.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}). {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no table. {advice}")
    for key, kind in keys.items():
        if type(found.get(key)) is not kind:
            raise UserError(f"{path} is damaged: it holds no '{key}'. {advice}")
    return found


QUEUED_CONFIG = "slurm/config.yaml"
"""In the run folder: the resolved config of its last job on a cluster, there before the run has written its own."""


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.]+:/")  # two letters at least: C:/ is a drive of Windows


def run_path(given: str | Path) -> Path:
    """Return the local path of a run directory or of a checkpoint.

    Args:
        given: The path as the user wrote it. ``~`` is the home directory.

    Raises:
        CheckpointError: If ``given`` is a URL. The message shows it as it was written.
    """
    path = Path(given).expanduser()
    if _URL.match(str(given)) and not path.exists():
        url = given if isinstance(given, str) else str(given).replace(":/", "://", 1)  # Path merges the slashes
        raise CheckpointError(
            f"{url} is a URL. Checkpoints and run directories are read and written on local storage only. "
            "Copy it to a local directory first, and give the path of that directory"
        )
    return path


def is_run_folder(path: Path) -> bool:
    """Return whether a folder is that of a run, begun or queued."""
    return any((path / name).is_file() for name in ("config.yaml", QUEUED_CONFIG))


def metrics_row(line: bytes, parse: Callable[[bytes], Any] = json.loads) -> dict[str, Any] | None:
    """The row that a line of metrics.jsonl is; None for what is no row, such as a line that is half written.

    ``parse``: a faster reader of JSON, where many rows are read.
    """
    try:
        row = parse(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a file or folder to ``NAME.WHY``, in place of an older one of that name."""
    aside = path.with_name(f"{path.name}.{why}")
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """The folder in which a run keeps the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """The step that a checkpoint folder's name tells; None for other folders."""
    match = re.fullmatch(r"step_(\d{8,})", path.name)
    return int(match[1]) if match else None


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, sound or not."""
    folders = [path for path in (run_dir / "checkpoints").glob("step_*") if checkpoint_step(path) is not None]
    return sorted(folders, key=lambda path: checkpoint_step(path) or 0)
