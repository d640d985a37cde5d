"""A folder of shards in the making: claimed once, its work kept until it is whole, continued on request alone; what its
shards are made of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from cosmos_ssl.data.storage import is_local, local_path
from cosmos_ssl.data.workers import WorkerStart
from cosmos_ssl.errors import StorageError, UserError
from cosmos_ssl.files import storage_error, written_whole

REPORT = "shards.json"
_T = TypeVar("_T")


class Output:
    """The folder that a command writes. ``work`` holds what is not needed once it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / ".work"

    @property
    def report(self) -> dict[str, Any] | None:
        """The report of finished work, None where it goes on."""
        found: dict[str, Any] = _read(self.folder / REPORT) or {}
        return found or None

    @contextmanager
    def claimed(self, identity: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """Begin, or go on with what the same options began. One process at a time; what a killed one left unfinished is
        removed.

        Raises UserError where the folder holds other things, or other work, or another process works on it.
        """
        from filelock import FileLock, Timeout

        try:
            begun = self.note("identity.json") if self.report is None else self.report["identity"]
            empty = self.folder.is_dir() and all(map(self._is_own_work, self.folder.iterdir()))
            there = begun is not None or (self.folder.exists() and not empty)
            if there and not resume:
                word = "is finished" if self.report else "was begun" if begun else "exists"
                hint = " or go on with it by --continue" if begun and not self.report else ""
                raise UserError(f"--output {self.folder} {word}. Give another folder{hint}")
            if there and begun is None:
                raise UserError(
                    f"--output {self.folder}: there is nothing to continue, it holds something else. Give "
                    "another folder"
                )
            if begun is not None and (changed := _changed(begun, json.loads(json.dumps(identity)))):
                raise UserError(
                    f"--output {self.folder} was begun with other input or options ({changed}). Give another folder"
                )
            self.work.mkdir(parents=True, exist_ok=True)
            with FileLock(self.work / "lock", timeout=0):
                if begun is None:
                    self.put("identity.json", identity)
                for part in (*self.folder.glob("*.part"), *self.work.glob("*.part")):
                    part.unlink()
                yield
        except Timeout as error:
            raise UserError(f"--output {self.folder}: another process is at work on it") from error
        except OSError as error:
            told = storage_error(error, f"--output {self.folder} cannot be written")
            hint = ". The same command with --continue goes on from here" if isinstance(told, StorageError) else ""
            raise type(told)(f"{told}{hint}") from error

    def _is_own_work(self, path: Path) -> bool:
        """Return whether this is of a process that was killed before it noted what it does: it is removed in the
        end.
        """
        if path != self.work or path.is_symlink() or not path.is_dir():
            return False
        return all(inner.name == "lock" or inner.suffix == ".part" for inner in path.iterdir())

    def note(self, name: str) -> Any:
        """A finished note of the work, None where there is none."""
        return _read(self.work / name)

    def put(self, name: str, value: Any) -> None:
        """Write a note, whole or not at all."""
        (self.work / name).parent.mkdir(exist_ok=True)
        with written_whole(self.work / name) as file:
            file.write(json.dumps(value).encode())

    def finish(self, sizes: Mapping[str, int], report: Mapping[str, Any]) -> None:
        """Write ``sizes.json`` and the report, then remove the work."""
        with written_whole(self.folder / "sizes.json") as file:
            file.write(json.dumps(sizes, indent=1).encode())
        with written_whole(self.folder / REPORT) as file:
            file.write(json.dumps(report, indent=1).encode())
        shutil.rmtree(self.work, ignore_errors=True)


def _read(path: Path) -> Any:
    """A note that was written whole, None where there is none. Raises UserError where it was damaged since."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Give another folder, or delete this one") from error


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in dict.fromkeys((*now, *before)) if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def schema_beside(shard: str) -> str | None:
    """The caption schema that the report beside a shard names, None where there is none."""
    try:
        found = (
            json.loads((local_path(shard).parent / REPORT).read_bytes())["caption_schema"] if is_local(shard) else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


# ---------------------------------------------------------------------------- shards

TAR_END = bytes(1024)
_HEAD = b"0000644\0" + b"0000000\0" * 2  # mode, owner, group
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(80) + bytes(167)  # a plain file, POSIX form
_TAIL_SUM = sum(_TAIL) + 8 * ord(" ")  # the checksum itself counts as spaces


def tar_member(name: str, body: bytes) -> bytes:
    """A file of a tar archive (POSIX ustar, time 0): header, body, padding. ``name`` has at most 100 bytes of ASCII."""
    before = name.encode("ascii").ljust(100, b"\0") + _HEAD + b"%011o\0%011o\0" % (len(body), 0)
    total = sum(before) + _TAIL_SUM
    return b"".join((before, b"%06o\0 " % total, _TAIL, body, bytes(-len(body) % 512)))


def numbers(shards: int) -> list[str]:
    """The numbers in the names of so many shards: ``0000`` and so on."""
    return [f"{number:0{max(4, len(str(shards - 1)))}d}" for number in range(shards)]


def spans(counts: Sequence[int], start: int, stop: int) -> Iterable[tuple[int, int, int]]:
    """The parts (of these sizes) that hold the numbers from start to stop: part, first and last place in it."""
    begin = 0
    for part, count in enumerate(counts):
        first, last = max(start - begin, 0), min(stop - begin, count)
        if first < last:
            yield part, first, last
        begin += count


# ---------------------------------------------------------------------------- worker processes

_inherited: list[Callable[..., Any]] = []


def _begin(start: WorkerStart, function: Callable[..., Any]) -> None:
    start(0)
    _inherited.append(function)


def _do(*job: Any) -> Any:
    return _inherited[0](*job)


def in_processes(
    workers: int, function: Callable[..., _T], jobs: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, _T]]:
    """Number and result of each job as it ends. The processes end with this one, however it ends.

    They inherit the function: what it holds is not sent, and what it keeps stays in its process. Raises what a job
    raises, StorageError where a process is killed.
    """
    if not jobs:
        return
    executor = ProcessPoolExecutor(min(workers, len(jobs)), get_context("fork"), _begin, (WorkerStart(), function))
    ended = False
    try:
        waiting: dict[Future[_T], int] = {}
        todo = iter(enumerate(jobs))
        while True:
            for number, job in todo:
                waiting[executor.submit(_do, *job)] = number
                if len(waiting) > 2 * workers:
                    break
            if not waiting:
                break
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
        ended = True
    except BrokenProcessPool as error:
        raise StorageError(
            "a worker process was killed; out of memory? --continue goes on from here, --workers N takes fewer"
        ) from error
    finally:
        processes = [] if ended else list((executor._processes or {}).values())
        for process in processes:  # in the midst of a shard: its unfinished file is removed when the work goes on
            process.kill()
        executor.shutdown(cancel_futures=True)
