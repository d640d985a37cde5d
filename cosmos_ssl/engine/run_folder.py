"""A run's folder: locked by its live job, true to one config, with versions and log."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cosmos_ssl.config import Config
from cosmos_ssl.config.source import dump_yaml
from cosmos_ssl.errors import UserError, listed, printable
from cosmos_ssl.files import folder_fault, read_object, set_aside, written_whole
from cosmos_ssl.identity import Identity

log = logging.getLogger(__name__)

LIBRARIES = (
    "cosmos-ssl",
    "torch",
    "torchvision",
    "xformers",
    "timm",
    "transformers",
    "open_clip_torch",
    "lightly",
    "webdataset",
    "pydantic",
    "numpy",
    "pillow",
)
"""Libraries that shape results, by the names of their distributions."""
_held: set[Path] = set()

_DARWIN = sys.platform == "darwin"
_FLOCK = struct.Struct("@qqihh" if _DARWIN else "@hhqqi4x")
"""C's ``struct flock``: type, whence, start, length, process on Linux; on macOS the first two come last."""
_WANTED = (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET) if _DARWIN else (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_TYPE = 3 if _DARWIN else 0


class _LogFile(logging.FileHandler):
    """A log that takes what it can: a full disk ends no run, and is no reason to print tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """As a terminal may show it."""
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Nothing: what could not be written is lost."""


LENGTH = ("schedule.epochs", "schedule.max_steps")
"""The keys that say how long a run is."""


class RunFolder:
    """The paths and the few files of a run that are neither metrics nor checkpoints."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        """``rank``: whose log and trace; all else is the first rank's to write."""
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.log = path / (f"log.rank{rank}.txt" if rank else "log.txt")
        self.trace = path / "trace" / f"rank{rank}.json.gz"
        self.fork = path / "fork.json"
        self._result = path / "result.json"
        self._identity = path / "identity.json"
        self._id = path / "id"
        self._mine: Identity | None = None
        self._accepted: list[str] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it. Raises UserError where it cannot be written or a live run holds it.

        The lock is the process's own: it ends with the process however that dies, and forked data workers do not
        inherit it.
        """
        key = self.path.resolve()
        if (
            key in _held
        ):  # the kernel's lock does not stand between two trainers of one process, and would end with a second handle
            raise self._in_use("this very process")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._unwritable(str(error.strerror)) from error
        try:
            self._claim(handle, key)
            try:
                yield
            finally:
                _held.discard(key)
        finally:
            os.close(handle)

    def check_free(self) -> None:
        """Raise UserError unless a run could write here now. No folder is made."""
        if self.path.exists():
            with self.locked():
                return
        if (fault := folder_fault(self.path)) is not None:
            raise self._unwritable(fault)

    def holder(self) -> str | None:
        """Who holds the folder (``process 12 on node3``), or None. It asks the kernel; nothing is locked meanwhile.

        Raises OSError where the storage has no locks, or the lock's file cannot be read.
        """
        if self.path.resolve() in _held:
            return "this very process"
        with suppress(FileNotFoundError), (self.path / ".lock").open("rb") as file:
            asked = fcntl.fcntl(file, fcntl.F_GETLK, _FLOCK.pack(*_WANTED))
            if _FLOCK.unpack(asked)[_TYPE] != fcntl.F_UNLCK:
                return file.read(200).decode(errors="replace").strip() or "an unknown process"
        return None

    def _unwritable(self, why: str) -> UserError:
        return UserError(f"output_dir: {self.path} cannot be written: {why}. Give another output_dir")

    def _claim(self, handle: int, key: Path) -> None:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise self._in_use(os.pread(handle, 200, 0).decode(errors="replace").strip()) from error
        except OSError:
            log.warning("%s lies on storage without locks: take care that only one run writes there", self.path)
        _held.add(key)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _in_use(self, holder: str) -> UserError:
        return UserError(
            f"run folder {self.path} is in use by a live run ({holder}). Wait for it, or give another output_dir"
        )

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Copy everything that the project logs into log.txt."""
        handler = _LogFile(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("cosmos_ssl").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("cosmos_ssl").removeHandler(handler)
            handler.close()

    # ------------------------------------------------------------------ whose folder it is

    def check_identity(
        self, mine: Identity, *, accept_data: bool = False, longer: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        """Hold the folder against the run that wants it; ``record`` makes it that run's. Nothing is written here.

        Raises UserError where it is another's; data that have changed may be accepted (``loader.changed_data``).
        ``longer`` is asked with the config of the run where nothing but its length differs, and raises UserError where
        that may not.
        """
        self._mine = mine
        theirs = self.identity()
        if theirs is None:
            return
        mine = self._mine = mine.begun_as(theirs)
        changed, moved = mine.config_changes(theirs), mine.data_changes(theirs)
        if not moved:
            self._mine = mine.knowing(theirs)
        why = ""
        if changed and longer is not None and all(change.partition(": ")[0] in LENGTH for change in changed):
            try:
                longer(theirs.config)
                changed = []
            except UserError as error:
                why = f": {error}"
        if moved and not changed and accept_data:
            self._accepted = moved
        elif changed:
            raise UserError(
                f"run folder {self.path} belongs to another config ({listed(changed + moved)}){why}. Give another "
                "output_dir. "
                f"To go on from this run there: --fork {self.path} takes over weights, optimiser and step, "
                f"model.pretrained={self.path} the weights alone"
            )
        elif moved:
            how = "loader.changed_data=accept to go on with the shards of now"
            raise UserError(
                f"run folder {self.path} belongs to another data set ({listed(moved)}). Give another "
                f"output_dir, or {how}."
            )

    def identity(self) -> Identity | None:
        """Whose folder it is, or None."""
        if not self._identity.exists():
            return None
        advice = (
            "It tells whose run this is: bring it back from a copy, or delete it if the run is of this very "
            "config and data"
        )
        found = read_object(self._identity, {"config": dict, "data": dict}, advice)
        return Identity(config=found["config"], data=found["data"], places=found.get("places", {}))

    def identify(self, *, finished: bool = False) -> None:
        """Write down the identity that ``check_identity`` was given, with what was not known of it before.

        Raises UserError for a ``finished`` run whose data have changed: it has not seen those of now.
        """
        if finished and self._accepted:
            raise UserError(
                f"run folder {self.path} is finished, with other data ({listed(self._accepted)}). Give another "
                "output_dir"
            )
        if self._mine is not None and self.identity() != self._mine:
            write_text(self._identity, json.dumps(self._mine.plain(), indent=1))

    def begun_in(self) -> str:
        """``training.precision`` with which the run was begun; ``auto`` in what is resumed goes on in it."""
        whose = self.identity() or self._mine
        assert whose is not None, "check_identity comes first"
        return str(whose.config["training"]["precision"])

    def record(self, config: Config, parts: Mapping[str, str]) -> None:
        """Write identity, resolved config and versions; say so where versions, or accepted shards, have changed since
        the start.
        """
        if self._accepted:
            log.warning(
                "the shards have changed since this run began (%s); it goes on with those of now",
                listed(self._accepted),
            )
        self.identify()
        write_text(self.config, dump_yaml(config.model_dump()))
        path = self.path / "versions.json"
        now = versions(parts)
        if path.exists() and (changed := differences(_older_versions(path, now), now)):
            log.warning("versions have changed since this run last started: %s", listed(changed))
        write_text(path, json.dumps(now, indent=1))

    def run_id(self) -> str:
        """One for the run for good: by it other programs know the run again."""
        if not self._id.exists():
            write_text(self._id, secrets.token_hex(8))
        return self._id.read_text().strip()

    # ------------------------------------------------------------------ its end

    def result(self) -> dict[str, Any] | None:
        """``step`` and final ``metrics`` of a finished run, or None."""
        if not self._result.exists():
            return None
        advice = "It says that the run is finished: delete it, and the same command goes on from the newest checkpoint"
        return read_object(self._result, {"step": int, "metrics": dict}, advice)

    def finish(self, step: int, metrics: Mapping[str, float], stopped: Mapping[str, Any] | None = None) -> None:
        """Mark the run as finished; ``stopped``: the callbacks that ended it early, and their options."""
        early = {"stopped": dict(stopped)} if stopped else {}
        write_text(self._result, json.dumps({"step": step, **early, "metrics": dict(metrics)}, indent=1))


def versions(parts: Mapping[str, str]) -> dict[str, str]:
    """Versions of Python, of the libraries that shape results, and of every part of the run."""
    return {"python": platform.python_version(), **library_versions(), **parts}


@cache
def library_versions() -> Mapping[str, str]:
    """The versions of ``LIBRARIES`` that are installed, as they were when first asked for: those that this process
    has imported.
    """
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _older_versions(path: Path, now: Mapping[str, str]) -> Mapping[str, Any]:
    """Return what ``path`` tells; a damaged file is kept aside, since nothing but a notice depends on it."""
    try:
        return read_object(path, {}, "")
    except UserError as error:
        log.warning("%sThe run goes on, and the file is kept as %s", error, set_aside(path).name)
        return now


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with written_whole(path) as file:
        file.write(f"{text.rstrip()}\n".encode())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for every key that differs."""
    absent = "absent"
    return [
        f"{k}: {old.get(k, absent)} -> {new.get(k, absent)}"
        for k in dict.fromkeys((*old, *new))
        if old.get(k) != new.get(k)
    ]
