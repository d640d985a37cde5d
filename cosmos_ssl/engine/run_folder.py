"""A run's folder: locked by its live job, true to one config, with versions and log."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cosmos_ssl.config import Config
from cosmos_ssl.config_source import dump_yaml
from cosmos_ssl.engine.watch import PlainFormatter
from cosmos_ssl.errors import UserError
from cosmos_ssl.identity import identity_differences

log = logging.getLogger(__name__)

_WATCHED = ("cosmos-ssl", "torch", "torchvision", "xformers", "timm", "transformers", "open_clip_torch", "lightly", "numpy", "pillow")
_held: set[Path] = set()


class RunFolder:
    """The paths and the few files of a run that are neither metrics nor checkpoints."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        """``rank``: whose log and trace; all else is the first rank's to write."""
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.pictures = path / "pictures"
        self.log = path / (f"log.rank{rank}.txt" if rank else "log.txt")
        self.trace = path / "trace" / f"rank{rank}.json.gz"
        self._result = path / "result.json"
        self._identity = path / "identity.json"
        self._accepted: list[str] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it. Raises UserError where it cannot be written or a live run holds it.

        The lock is the process's own: it ends with the process however that dies, and forked data workers do not inherit it.
        """
        key = self.path.resolve()
        if key in _held:  # the kernel's lock does not stand between two trainers of one process, and would end with a second handle
            raise self._in_use("this very process")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}. Give another output_dir") from error
        try:
            self._claim(handle, key)
            try:
                yield
            finally:
                _held.discard(key)
        finally:
            os.close(handle)

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
        return UserError(f"run folder {self.path} is in use by a live run ({holder}). Wait for it, or give another output_dir")

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Copy everything that the project logs into log.txt."""
        handler = logging.FileHandler(self.log, encoding="utf-8")
        handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("cosmos_ssl").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("cosmos_ssl").removeHandler(handler)
            handler.close()

    # ------------------------------------------------------------------ whose folder it is

    def belong(self, config: Config, data: Mapping[str, Any]) -> None:
        """Claim the folder for the run of this config and data set.

        Raises UserError where it is another's; shards that have changed may be accepted (``loader.changed_data``).
        """
        mine = {"config": config.model_dump(), "data": _plain(data)}
        if not self._identity.exists():
            write_whole(self._identity, json.dumps(mine, indent=1))
            return
        theirs = json.loads(self._identity.read_text())
        changed = identity_differences(theirs["config"], mine["config"]) if theirs["config"] != mine["config"] else []
        moved = [f"data, {fault}" for fault in differences(theirs["data"], mine["data"])]
        if not changed and moved and config.loader.changed_data == "accept":
            self._accepted = moved
            write_whole(self._identity, json.dumps({**theirs, "data": mine["data"]}, indent=1))
        elif changed or moved:
            whose, how = ("config", "") if changed else ("data set", ", or loader.changed_data=accept to go on with the shards of now")
            raise UserError(
                f"run folder {self.path} belongs to another {whose} ({_listed(changed + moved)}). Give another output_dir{how}."
            )

    def begun_in(self) -> str:
        """``training.precision`` with which the run was begun; ``auto`` in what is resumed goes on in it."""
        return str(json.loads(self._identity.read_text())["config"]["training"]["precision"])

    def record(self, config: Config, parts: Mapping[str, str]) -> None:
        """Write the resolved config and the versions at work; say so where versions, or accepted shards, have changed since the start."""
        if self._accepted:
            log.warning("the shards have changed since this run began (%s); it goes on with those of now", _listed(self._accepted))
        write_whole(self.config, dump_yaml(config.model_dump()))
        path = self.path / "versions.json"
        now = versions(parts)
        if path.exists() and (changed := differences(json.loads(path.read_text()), now)):
            log.warning("versions have changed since this run last started: %s", _listed(changed))
        write_whole(path, json.dumps(now, indent=1))

    # ------------------------------------------------------------------ its end

    def result(self) -> dict[str, Any] | None:
        """``step`` and final ``metrics`` of a finished run, or None."""
        if not self._result.exists():
            return None
        found: dict[str, Any] = json.loads(self._result.read_text())
        return found

    def finish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Mark the run as finished."""
        write_whole(self._result, json.dumps({"step": step, "metrics": dict(metrics)}, indent=1))


def versions(parts: Mapping[str, str]) -> dict[str, str]:
    """Versions of Python, of the libraries that shape results, and of every part of the run."""
    found = {"python": platform.python_version()}
    for name in _WATCHED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | dict(parts)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text.rstrip("\n") + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for every key that differs."""
    absent = "absent"
    return [f"{k}: {old.get(k, absent)} -> {new.get(k, absent)}" for k in dict.fromkeys((*old, *new)) if old.get(k) != new.get(k)]


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    return json.loads(json.dumps(value))


def _listed(faults: Sequence[str], limit: int = 4) -> str:
    return ", ".join(faults[:limit]) + (f", and {len(faults) - limit} more" if len(faults) > limit else "")
