"""Copies of a run's checkpoints at an fsspec URL: none is taken for whole that is not, whenever either side was killed.

``URL/checkpoints/step_00001000/`` holds the files of a checkpoint as they lie in the run folder and, in ``run/``, those
by which the run goes on as one run elsewhere, as they stood then. The checkpoint's ``manifest.json``, with sizes and
SHA-256 hashes, is written when all else is there, and is the first to go when a copy is removed or written again. Of a
finished run ``end/`` holds its files as they are in the end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from cosmos_ssl.data.storage import STILL_SECONDS, bounded, connect_seconds, has_answered, note_answer
from cosmos_ssl.engine import rollback, segments
from cosmos_ssl.engine.checkpoint import MAX_STEP, find_fault, latest_checkpoint
from cosmos_ssl.engine.run_folder import LENGTH, RunFolder
from cosmos_ssl.errors import CheckpointError, CosmosError, StorageError, UserError, first_line, listed
from cosmos_ssl.files import checkpoint_folder, checkpoint_step, written_whole
from cosmos_ssl.identity import Identity
from cosmos_ssl.liveness import alive

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RUN_FILES = (
    *("identity.json", "id", "config.yaml", "versions.json", "fork.json", "metrics.jsonl"),
    *(rollback.FILE, segments.FILE),
)
"""What of a run folder goes along with each checkpoint."""
RESULT = "result.json"
_CHUNK = 1 << 24
_NAME = re.compile(r"[\w-][\w.-]*")

T = TypeVar("T")


def url_fault(url: str, run_dir: Path) -> str | None:
    """What is wrong with ``checkpoints.copy_to``, as far as can be told without a look there; None where nothing is."""
    import fsspec

    if "::" in url:
        return f"{url} is a chain of URLs. Give one, such as s3://bucket/folder"
    protocol, path = fsspec.core.split_protocol(url)
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:  # the protocol's own package is missing, or nobody knows it
        ours = ". Run: pip install 'cosmos-ssl[s3]'" if protocol in ("s3", "s3a") else ""
        return f"{url}: {str(error).splitlines()[0]}{ours}"
    if not _removes(kind):
        return f"{url}: files can be read there alone. Give a folder or an object store, such as s3://bucket/folder"
    if not path.strip("/"):
        return f"{url} names no folder. Give one, such as s3://bucket/folder"
    if kind.protocol == "file" or "file" in kind.protocol:
        there, run = Path(path).expanduser().absolute(), run_dir.absolute()
        if there == run or there.is_relative_to(run):
            return f"{url} lies in the run folder {run_dir} itself. Give another place"
    return None


def _removes(kind: Any) -> bool:
    """Whether a kind of file system can remove files, which those that are only read from cannot."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    bases, names = (AbstractFileSystem, AsyncFileSystem), ("rm", "_rm", "rm_file", "_rm_file")
    return any(getattr(kind, name, None) not in [getattr(base, name, None) for base in bases] for name in names)


class Remote:
    """The copies of one run below a URL. Every method raises OSError where the storage fails or stands still."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._moved = 0

    # ------------------------------------------------------------------ what is there

    def whole(self) -> dict[int, Mapping[str, Any]]:
        """The manifest of each copy whose files have the sizes that it tells, by step, oldest first."""

        def look(system: Any, base: str) -> dict[int, Mapping[str, Any]]:
            found = {}
            for name in _names(system, base):
                step = checkpoint_step(Path(name))
                manifest = None if step is None else self._manifest(system, f"{base}/{name}")
                if step is not None and manifest is not None:
                    found[step] = manifest
            return dict(sorted(found.items()))

        return self._asked(look)

    def read(self, step: int, name: str) -> bytes | None:
        """A file of the run as it stood at ``step``, or, of a finished run, in the end; None where it had none.

        Raises CheckpointError for one that has changed since it was written.
        """

        def look(system: Any, base: str) -> bytes | None:
            for folder in ("end", "run"):
                place = f"{_folder(base, step)}/{folder}"
                manifest = self._manifest(system, place)
                if manifest is not None:
                    if name not in manifest:
                        return None
                    content: bytes = system.cat_file(f"{place}/{name}")
                    if hashlib.sha256(content).hexdigest() != manifest[name]["sha256"]:
                        raise CheckpointError(f"{self.url}: {name} of step {step:,} has changed since it was written")
                    return content
            raise CheckpointError(f"{self.url}: the files of the run at step {step:,} are not there in whole")

        return self._asked(look)

    def state(self, step: int) -> dict[str, Any]:
        """The state of a copy. Raises CheckpointError."""
        try:
            found = json.loads(self._asked(lambda system, base: system.cat_file(f"{_folder(base, step)}/state.json")))
        except ValueError as error:
            raise CheckpointError(f"the copy of step {step:,} at {self.url} is damaged: state.json") from error
        return {"step": step, **found}

    def _manifest(self, system: Any, place: str) -> Mapping[str, Any] | None:
        """The files of a folder by its manifest, None where it is not whole."""
        try:
            files = json.loads(system.cat_file(f"{place}/{MANIFEST}"))["files"]
            sizes = {posixpath.basename(one["name"].rstrip("/")): one["size"] for one in system.ls(place, detail=True)}
            whole = all(_NAME.fullmatch(name) and sizes.get(name) == told["bytes"] for name, told in files.items())
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return dict(files) if whole else None

    # ------------------------------------------------------------------ sending

    def send(self, checkpoint: Path, run: Path) -> None:
        """Copy a checkpoint folder and the files of its run; the same hashes are held on the way.

        Raises CheckpointError where the checkpoint here is no longer what its manifest says.
        """
        step = checkpoint_step(checkpoint)
        assert step is not None, checkpoint
        try:
            told = (checkpoint / MANIFEST).read_bytes()
            files = dict(json.loads(told)["files"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{checkpoint / MANIFEST} is damaged") from error

        def put(system: Any, base: str) -> None:
            place = _folder(base, step)
            for folder in (place, f"{place}/end"):
                _drop_manifest(system, folder)
            self._put_run(system, f"{place}/run", run, RUN_FILES)
            for name, entry in files.items():
                with (checkpoint / name).open("rb") as file:
                    if self._put(system, f"{place}/{name}", _chunks(file)) != entry:
                        raise CheckpointError(f"{checkpoint / name} has changed since it was written")
            self._put(system, f"{place}/{MANIFEST}", [told])

        self._asked(put)

    def send_end(self, step: int, run: Path) -> None:
        """Copy the files of a finished run beside the copy of its last checkpoint."""

        def put(system: Any, base: str) -> None:
            place = f"{_folder(base, step)}/end"
            _drop_manifest(system, place)
            self._put_run(system, place, run, (*RUN_FILES, RESULT))

        self._asked(put)

    def _put_run(self, system: Any, place: str, run: Path, names: tuple[str, ...]) -> None:
        files = {}
        for name in names:
            if (path := run / name).exists():
                content = path.read_bytes()
                if name.endswith(".jsonl"):
                    content = content[: content.rfind(b"\n") + 1]  # without a row that is being written
                files[name] = self._put(system, f"{place}/{name}", [content])
        self._put(system, f"{place}/{MANIFEST}", [json.dumps({"files": files}, indent=1).encode() + b"\n"])

    def _put(self, system: Any, path: str, chunks: Any) -> dict[str, Any]:
        """Write one file, and see that it has its size there; size and hash."""
        system.makedirs(posixpath.dirname(path), exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with system.open(path, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
                self._moved += 1
        system.invalidate_cache()
        if (there := system.info(path)["size"]) != size:
            raise OSError(errno.EIO, f"{there:,} of {size:,} bytes have come", path)
        self._moved += 1
        return {"bytes": size, "sha256": digest.hexdigest()}

    def remove(self, step: int) -> None:
        """Remove the copy of a step."""

        def drop(system: Any, base: str) -> None:
            place = _folder(base, step)
            _drop_manifest(system, place)
            system.rm(place, recursive=True)

        self._asked(drop)

    # ------------------------------------------------------------------ bringing back

    def fetch(self, step: int, run: Path, *, alone: bool = False) -> None:
        """Bring a checkpoint and, unless it comes ``alone``, the files of its run into a run folder: first these, and
        the checkpoint's name last.

        Raises CheckpointError where the copy is not sound, and changes nothing then.
        """
        final = checkpoint_folder(run, step)
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            names = [*self.whole()[step], MANIFEST]

            def get(system: Any, base: str) -> None:
                for name in names:
                    with (
                        system.open(f"{_folder(base, step)}/{name}", "rb") as source,
                        (temporary / name).open("wb") as file,
                    ):
                        for chunk in _chunks(source):
                            file.write(chunk)
                            self._moved += 1
                            alive()
                        file.flush()
                        os.fsync(file.fileno())

            self._asked(get)
            if (fault := find_fault(temporary)) is not None:
                raise CheckpointError(f"the copy of step {step:,} at {self.url} is damaged: {fault}")
            files = {} if alone else {name: self.read(step, name) for name in (*RUN_FILES, RESULT)}
            for name, content in files.items():
                if content is not None:
                    with written_whole(run / name) as file:
                        file.write(content)
            if final.exists():  # a damaged one of this step
                shutil.rmtree(final)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _asked(self, call: Callable[[Any, str], T]) -> T:
        """``call(file system, folder of the checkpoints there)``, ended where nothing moves for long."""

        def ask() -> T:
            import fsspec

            system, path = fsspec.core.url_to_fs(self.url)
            system.invalidate_cache()  # others write there too
            return call(system, f"{path.rstrip('/')}/checkpoints")

        seconds = STILL_SECONDS if has_answered(self.url) else connect_seconds()
        try:
            found = bounded(ask, self.url, seconds, lambda: self._moved)
            note_answer(self.url)
            return found
        except (CosmosError, OSError):
            raise
        except Exception as error:  # object stores raise errors of their own
            raise OSError(errno.EIO, f"{first_line(error)}", self.url) from error


def _folder(base: str, step: int) -> str:
    return f"{base}/{checkpoint_folder(Path(), step).name}"


def _names(system: Any, folder: str) -> list[str]:
    try:
        return [posixpath.basename(name.rstrip("/")) for name in system.ls(folder, detail=False)]
    except FileNotFoundError:
        return []


def _drop_manifest(system: Any, place: str) -> None:
    if system.exists(f"{place}/{MANIFEST}"):
        system.rm_file(f"{place}/{MANIFEST}")


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


# ---------------------------------------------------------------------------- at the start of a run


def bring_back(
    url: str,
    folder: RunFolder,
    mine: Identity,
    *,
    accept_data: bool = False,
    same_until: Callable[[Mapping[str, Any]], int] = lambda _: MAX_STEP,
    reach: int = 0,
) -> None:
    """Fetch the newest sound copy at ``url`` that this run can go on from, where the locked ``folder`` has none as new,
    and what it may go back to by ``reach`` steps; nothing where it has.

    ``same_until``: to which step a run of another length, by its config, is this one. Raises UserError where the copies
    are another run's, StorageError where they cannot be read and there is no checkpoint here to go on from.
    """
    remote = Remote(url)
    try:
        there = list(remote.whole())
        if there:
            _check_owner(remote, there[-1], folder, mine, accept_data)
            own = latest_checkpoint(folder.path)
            newer = -1 if own is None else checkpoint_step(own) or 0
            found = [step for step in there if step > newer]
            steps = _own(remote, found, there, folder, same_until) or (found if own is None else [])
            for step in sorted(rollback.needed(steps, reach) - set(steps[-1:])):
                _fetch_newest(remote, [step], folder, alone=True)
            _fetch_newest(remote, steps, folder)
    except OSError as error:
        told = f"checkpoints.copy_to: {url} cannot be read ({error.strerror or error})"
        if latest_checkpoint(folder.path) is None:
            raise StorageError(f"{told}, and {folder.path} has no checkpoint") from error
        log.warning("%s; the run goes on from its checkpoint here", told)


def _own(
    remote: Remote,
    steps: list[int],
    there: list[int],
    folder: RunFolder,
    same_until: Callable[[Mapping[str, Any]], int],
) -> list[int]:
    """Those of the copies that are of the way that the run has taken, as far as it is known: not those that it went
    back from since, or that the end of a shorter run has shaped.
    """
    records = rollback.read_records(folder.path) or []
    for step in there if steps else []:
        with suppress(CheckpointError):
            records += rollback.parsed(remote.read(step, rollback.FILE) or b"{}")
    kept = []
    for step in steps:
        try:
            told = json.loads(remote.read(step, "identity.json") or b"{}").get("config")
            left = records and rollback.later_than(remote.state(step), records)
        except (CheckpointError, ValueError):  # it is found to be damaged when it is fetched
            told, left = None, False
        if not left and (told is None or step <= same_until(told)):
            kept.append(step)
    return kept


def _fetch_newest(remote: Remote, steps: list[int], folder: RunFolder, *, alone: bool = False) -> None:
    for step in reversed(steps):
        try:
            remote.fetch(step, folder.path, alone=alone)
        except CheckpointError as error:
            log.warning("%s; it is passed over", error)
            continue
        log.info("the checkpoint of step %s was fetched from %s", f"{step:,}", remote.url)
        return


def _check_owner(remote: Remote, step: int, folder: RunFolder, mine: Identity, accept_data: bool) -> None:
    """Raise UserError unless the copies are this run's, which may be longer now."""
    try:
        told, number = remote.read(step, "identity.json"), remote.read(step, "id")
        theirs = Identity(**json.loads(told or b"{}"))
    except (CheckpointError, ValueError, TypeError) as error:
        log.warning("%s: the copy of step %s tells not whose it is (%s)", remote.url, f"{step:,}", error)
        return
    mine = mine.begun_as(theirs)
    changes = [change for change in mine.config_changes(theirs) if change.partition(": ")[0] not in LENGTH]
    changes += [] if accept_data else mine.data_changes(theirs)
    if changes:
        told_changes = listed(changes)
        raise UserError(
            f"checkpoints.copy_to: {remote.url} holds the copies of another run ({told_changes}). Give another URL"
        )
    own = folder.path / "id"
    if own.exists() and own.read_bytes() != number and latest_checkpoint(folder.path) is not None:
        raise UserError(
            f"checkpoints.copy_to: {remote.url} holds the copies of another run of this config, begun in another "
            "folder. Give each its own URL"
        )
