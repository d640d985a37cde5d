"""Checkpoints on disk: a folder of tensors, state and a manifest, written so that no crash leaves half a one.

``checkpoints/step_00001000/`` holds ``student.safetensors``, ``teacher.safetensors`` where there is a teacher,
``optimizer.safetensors``, ``state.json`` and, last, ``manifest.json`` with sizes and SHA-256 hashes. A role may lie in
several files (``layout``), which several ranks write.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Role
from cosmos_ssl.engine.layout import INDEX, TENSORS, File, Split, files_of, index, role_of
from cosmos_ssl.errors import CheckpointError, TrainingError, listed
from cosmos_ssl.files import checkpoint_folder, checkpoint_folders, checkpoint_step
from cosmos_ssl.functional import is_sharded, laid_out, rank, whole
from cosmos_ssl.interop.files import find_nonfinite, read_json, read_safetensors, same_kind

log = logging.getLogger(__name__)

FORMAT = 1
MAX_STEP = 1 << 48
_CHUNK = 1 << 24
_FILE = re.compile(r"[\w-][\w.-]*")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a checkpoint holds, in host memory of its own: training may go on while it is written."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file: ``student``, ``teacher``, ``optimizer``."""
    state: Mapping[str, Any]
    buffers: Collection[str] = ()
    """Names of the tensors that may hold infinities, such as masks; none may hold NaN."""
    settled: bool = True
    """False where the last update was left out as not finite: older checkpoints stay beside this one."""
    split: Split = field(default_factory=Split)
    files: Mapping[str, Sequence[File]] = field(default_factory=dict)
    """By role; one that is not there lies in one file, and is here as a whole."""

    @property
    def others(self) -> set[int]:
        """The ranks that write files of it beside the first."""
        return {file.rank for files in self.files.values() for file in files} - {0}

    def contents(self, role: str) -> Sequence[tuple[str, Mapping[str, Tensor]]]:
        """The files of a role that this rank writes, by name, with their tensors."""
        own, files = self.tensors[role], self.files.get(role)
        if files is None:
            return [(f"{role}{TENSORS}", own)]
        return [(file.name, {name: own[name] for name in file.tensors}) for file in files if file.rank == rank()]

    def bytes(self) -> int:
        """All that all ranks write of tensors."""
        held = (sum(x.nbytes for x in own.values()) for role, own in self.tensors.items() if role not in self.files)
        return sum(held) + sum(file.bytes for files in self.files.values() for file in files)


def to_host(tensors: Mapping[str, Tensor], kept: Collection[str] | None = None) -> dict[str, Tensor]:
    """Contiguous copies in host memory, of those that are ``kept``.

    A collective where some are sharded: these are put together one after the other, on ranks that do not keep them too.
    """
    copies = {}
    for name, tensor in tensors.items():
        keeps = kept is None or name in kept
        found = whole(tensor) if keeps or is_sharded(tensor) else tensor
        if keeps:
            copies[name] = found.to("cpu", copy=True).contiguous()
    return copies


def to_files(
    roles: Mapping[str, Mapping[str, Tensor]], split: Split
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[File]]]:
    """Copies in host memory of the tensors that this rank writes, by role, and who writes what. As ``to_host``."""
    files = split.files({role: {name: x.nbytes for name, x in own.items()} for role, own in roles.items()})
    own = {role: {name for file in files[role] if file.rank == rank() for name in file.tensors} for role in roles}
    return {role: to_host(tensors, own[role]) for role, tensors in roles.items()}, files


# ---------------------------------------------------------------------------- writing


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """Make the empty folder, of a temporary name, in which a checkpoint is written. Raises OSError."""
    final = checkpoint_folder(run_dir, step)
    final.parent.mkdir(exist_ok=True)
    temporary = _temporary(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def save_checkpoint(run_dir: Path, snapshot: Snapshot, hear: Callable[[], Mapping[str, Any]] | None = None) -> Path:
    """Write ``snapshot`` under a temporary name, flush it to the disk, give it its name.

    Where other ranks write files of it, in a folder that was begun before, ``hear`` waits for what they tell of these.
    Raises OSError, and before it writes anything also where the disk has no room; TrainingError where a tensor is not
    finite.
    """
    final = checkpoint_folder(run_dir, snapshot.step)
    temporary = _temporary(final)
    final.parent.mkdir(exist_ok=True)
    try:
        _check_finite(snapshot)
        if hear is None:
            shutil.rmtree(temporary, ignore_errors=True)
        _check_room(final.parent, snapshot)
        if hear is None:
            begin_checkpoint(run_dir, snapshot.step)
        files = _write_tensors(temporary, snapshot)
        if hear is not None:
            files |= _seen(temporary, hear())
        for role, pieces in snapshot.files.items():
            if len(pieces) > 1:
                files[f"{role}{INDEX}"] = _write(temporary / f"{role}{INDEX}", _json(index(list(pieces))))
        files["state.json"] = _write(temporary / "state.json", _json({"format": FORMAT, **snapshot.state}))
        _write(temporary / "manifest.json", _json({"format": FORMAT, "files": files}))
        _sync_folder(temporary)
        if final.exists():  # a damaged one of this step: a sound one is never written again
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(final.parent)
    except (OSError, TrainingError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def save_share(run_dir: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write this rank's files of a checkpoint that the first rank has begun; their sizes and hashes.

    Raises OSError; TrainingError where a tensor is not finite.
    """
    _check_finite(snapshot)
    return _write_tensors(_temporary(checkpoint_folder(run_dir, snapshot.step)), snapshot)


def _write_tensors(folder: Path, snapshot: Snapshot) -> dict[str, Any]:
    """Write this rank's files of tensors."""
    return {
        name: _write(folder / name, _safetensors(tensors, role))
        for role in snapshot.tensors
        for name, tensors in snapshot.contents(role)
    }


def _seen(folder: Path, told: Mapping[str, Any]) -> Mapping[str, Any]:
    """What other ranks tell of their files, if these are seen here. Raises OSError."""
    for name, entry in told.items():
        if not (folder / name).exists() or (folder / name).stat().st_size != entry["bytes"]:
            raise OSError(errno.EIO, "another rank has written it, and it is not seen here", str(folder / name))
    return told


def _check_finite(snapshot: Snapshot) -> None:
    """Raise TrainingError for the first tensor that is not finite."""
    for role, tensors in snapshot.tensors.items():
        sick = find_nonfinite(tensors, buffers=snapshot.buffers)
        if sick:
            raise TrainingError(f"{sick} of the {role} is not finite")


def _check_room(folder: Path, snapshot: Snapshot) -> None:
    needed, free = snapshot.bytes(), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free", str(folder))


def _write(path: Path, chunks: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Write and flush one file; its size and hash. Large chunks release the interpreter's lock."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            for start in range(0, len(chunk), _CHUNK):
                piece = memoryview(chunk)[start : start + _CHUNK]
                digest.update(piece)
                while piece:
                    written = file.write(piece)
                    size += written
                    piece = piece[written:]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: Mapping[str, Tensor], role: str) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file.

    Its own writer copies everything while holding the interpreter's lock, which stalls the steps.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "role": role}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _json(value: Any) -> Iterator[bytes]:
    yield (json.dumps(value, indent=1) + "\n").encode()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_as(path: Path, name: str) -> None:
    """Keep a checkpoint under another name beside it, in the place of what is called so; files are shared where they
    can be (hard links).

    Raises OSError.
    """
    kept, new, old = (path.with_name(each) for each in (name, f".{name}.tmp", f".{name}.old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(path, new, copy_function=_link)
    if kept.exists():
        kept.rename(old)
    new.rename(kept)
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # storage without hard links
        shutil.copy2(source, target)


# ---------------------------------------------------------------------------- finding


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is, or was, a checkpoint: by its name, or by what it holds."""
    return path.is_dir() and (
        checkpoint_step(path) is not None or (path / "manifest.json").exists() or (path / "state.json").exists()
    )


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint folder; None for a sound one: manifest and state are true to it, and its
    numbers finite.
    """
    try:
        files = _manifest(path)
        for name, told in files.items():
            if (size := (path / name).stat().st_size) != told["bytes"]:
                return f"{name} has {size:,} bytes, expected {told['bytes']:,}"
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                    return f"{name} has changed since it was written"
        read_state(path)
        tensors = {role: load_tensors(path, role) for name in files if (role := role_of(name)) is not None}
        trained = {name.rpartition(".")[0] for name in tensors.get("optimizer", ())}
        for role, found in tensors.items():
            if sick := find_nonfinite(found, buffers=found.keys() - trained):
                return f"{role}{TENSORS} holds a NaN or an infinity ({sick})"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}/")
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror}"
    return None


def _manifest(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The files of a checkpoint folder by its manifest, which has an entry of every one that may be read.

    Raises CheckpointError.
    """
    files = read_json(path / "manifest.json").get("files")
    told = list(files.values()) if isinstance(files, dict) else [None]
    if not all(isinstance(entry, dict) and type(entry.get("bytes")) is int and "sha256" in entry for entry in told):
        raise CheckpointError("manifest.json cannot be used: it tells no files with their sizes and hashes")
    assert isinstance(files, dict)
    there = {found.name for pattern in (f"*{TENSORS}", f"*{INDEX}") for found in path.glob(pattern)}
    student = f"student{INDEX if f'student{INDEX}' in files else TENSORS}"
    unnamed = {"state.json", student, *there} - files.keys()
    if unnamed:
        raise CheckpointError(f"manifest.json cannot be used: it does not tell of {min(unnamed)}")
    for name in files:
        if not _FILE.fullmatch(name) or ((path / name).exists() and not (path / name).is_file()):
            raise CheckpointError(f"manifest.json cannot be used: {name[:80]!r} is no file of this folder")
    return files


def latest_checkpoint(run_dir: Path, at_most: int = MAX_STEP) -> Path | None:
    """The newest sound checkpoint (see ``find_fault``), or None; newer ones that are not are named in the log.

    Those of steps after ``at_most`` are left aside.
    """
    for path in reversed(checkpoint_folders(run_dir)):
        if (checkpoint_step(path) or 0) > at_most:
            continue
        fault = find_fault(path)
        if fault is None:
            return path
        log.warning("%s is damaged (%s) and is passed over", path, fault)
    return None


# ---------------------------------------------------------------------------- reading


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint folder, whose step is that of its name. Raises CheckpointError."""
    state = read_json(path / "state.json")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}/state.json is not of format {FORMAT}, the one this version of cosmos-ssl reads")
    step = state.get("step")
    if type(step) is not int or not 0 <= step < MAX_STEP or checkpoint_step(path) not in (None, step):
        raise CheckpointError(
            f"{path}/state.json tells step {str(step)[:40]}, which is no step, or not that of the folder"
        )
    return state


def load_tensors(path: Path, role: Role | str) -> dict[str, Tensor]:
    """The tensors of one role of a checkpoint folder, ``student``, ``teacher``, ``optimizer`` or a callback's name, in
    whichever form it lies there. They stay in their files until they are used, each by itself.

    Raises CheckpointError where a file is missing, unreadable, of another role, or does not hold what its index tells.
    """
    tensors: dict[str, Tensor] = {}
    for file, names in files_of(path, role).items():
        if not file.exists():
            raise CheckpointError(f"{path}/{file.name} is missing")
        metadata, found = read_safetensors(file)
        if metadata.get("role") != role:
            raise CheckpointError(f"{file} says that it holds the {metadata.get('role')}, not the {role}")
        if names is not None and names != found.keys():
            raise CheckpointError(f"{file} holds other tensors than {role}{INDEX} tells")
        tensors |= found
    return tensors


def load_role(path: Path, role: Role) -> dict[str, Tensor]:
    """The tensors of one role of a run, where losses are the student's: those that a teacher had in a checkpoint of an
    older version are left out. Raises as ``load_tensors``.
    """
    return of_role(load_tensors(path, role), role)


def of_role(tensors: Mapping[str, Tensor], role: Role) -> dict[str, Tensor]:
    """Those of its tensors that a role has: a teacher's losses are left out."""
    return {name: x for name, x in tensors.items() if role == "student" or not name.startswith("losses.")}


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise CheckpointError with the first differences in keys, shapes and types; no value is read, so ``module`` may
    be on meta.
    """
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own if name not in tensors]
    faults += [f"{name} is unknown to the model" for name in tensors if name not in own]
    for name, value in own.items():
        if name in tensors and tensors[name].shape != value.shape:
            faults.append(f"{name} is {list(tensors[name].shape)}, the model's {list(value.shape)}")
        elif name in tensors and not same_kind(tensors[name], value):
            faults.append(f"{name} is of {tensors[name].dtype}, the model's of {value.dtype}")
    if faults:
        raise CheckpointError(f"{source} does not fit the model: {listed(faults, '; ')}")


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Load ``tensors`` into ``module``. Raises CheckpointError as ``check_fit`` does."""
    check_fit(module, tensors, source)
    own = module.state_dict()
    module.load_state_dict(
        {name: laid_out(x, own[name]) if is_sharded(own[name]) else x for name, x in tensors.items()}
    )
