"""Checkpoints on disk: a folder of tensors, state and a manifest, written so that no crash leaves half a one.

``checkpoints/step_00001000/`` holds ``student.safetensors``, ``teacher.safetensors`` where there is a teacher,
``optimizer.safetensors``, ``state.json`` and, last, ``manifest.json`` with sizes and SHA-256 hashes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Role
from cosmos_ssl.errors import CheckpointError, TrainingError

log = logging.getLogger(__name__)

FORMAT = 1
_CHUNK = 1 << 24
_FOLDER = re.compile(r"step_(\d{8,})")
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


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in host memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------- writing


def save_checkpoint(run_dir: Path, snapshot: Snapshot) -> Path:
    """Write ``snapshot`` under a temporary name, flush it to the disk, give it its name.

    Raises OSError, and before it writes anything also where the disk has no room; TrainingError where a tensor is not finite.
    """
    unsound = _find_unsound(snapshot)
    if unsound:
        raise TrainingError(unsound)
    parent = run_dir / "checkpoints"
    parent.mkdir(exist_ok=True)
    final = parent / f"step_{snapshot.step:08d}"
    temporary = parent / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    _check_room(parent, snapshot)
    temporary.mkdir()
    try:
        files = {
            f"{name}.safetensors": _write(temporary / f"{name}.safetensors", _safetensors(tensors, name))
            for name, tensors in snapshot.tensors.items()
        }
        files["state.json"] = _write(temporary / "state.json", _json({"format": FORMAT, **snapshot.state}))
        _write(temporary / "manifest.json", _json({"format": FORMAT, "files": files}))
        _sync_folder(temporary)
        if final.exists():  # a damaged one of this step: a sound one is never written again
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _find_unsound(snapshot: Snapshot) -> str:
    """The first tensor that is not finite, in words."""
    for role, tensors in snapshot.tensors.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.numel():
                ends = torch.stack(tensor.aminmax())  # NaN where any number is
                if ends.isnan().any() or (ends.isinf().any() and name not in snapshot.buffers):
                    return f"{name} of the {role} is not finite"
    return ""


def _check_room(folder: Path, snapshot: Snapshot) -> None:
    needed = sum(x.numel() * x.element_size() for tensors in snapshot.tensors.values() for x in tensors.values())
    free = shutil.disk_usage(folder).free
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
    """The bytes of a safetensors file. Its own writer copies everything while holding the interpreter's lock, which stalls the steps."""
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


# ---------------------------------------------------------------------------- finding


def checkpoint_step(path: Path) -> int | None:
    """The step that a checkpoint folder's name tells; None for other folders."""
    match = _FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, sound or not."""
    folders = [path for path in (run_dir / "checkpoints").glob("step_*") if checkpoint_step(path) is not None]
    return sorted(folders, key=lambda path: checkpoint_step(path) or 0)


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if its manifest verifies."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name, told in manifest["files"].items():
            if (path / name).stat().st_size != told["bytes"]:
                return f"{name} has {(path / name).stat().st_size:,} bytes, expected {told['bytes']:,}"
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                    return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json cannot be used: {error!r}"
    return None


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest verifies, or None; newer ones that do not are named in the log."""
    for path in reversed(checkpoint_folders(run_dir)):
        fault = find_fault(path)
        if fault is None:
            return path
        log.warning("%s is damaged (%s) and is passed over", path, fault)
    return None


# ---------------------------------------------------------------------------- reading


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint folder. Raises CheckpointError."""
    try:
        state = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/state.json cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}/state.json is not of format {FORMAT}, the one this version of cosmos-ssl reads")
    return state


def load_tensors(path: Path, role: Role | str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint folder, ``student``, ``teacher`` or ``optimizer``, in host memory.

    Raises CheckpointError where the file is missing, unreadable or of another role.
    """
    from safetensors import SafetensorError, safe_open

    file = path / f"{role}.safetensors"
    if not file.exists():
        there = ", ".join(sorted(found.stem for found in path.glob("*.safetensors"))) or "no tensors at all"
        raise CheckpointError(f"{path} holds no {role}. It holds {there}")
    try:
        with safe_open(file, framework="pt") as opened:
            found_role = (opened.metadata() or {}).get("role")
            if found_role != role:
                raise CheckpointError(f"{file} says that it holds the {found_role}, not the {role}")
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load ``tensors`` into ``module``. Raises CheckpointError with the first differences in keys and shapes."""
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own if name not in tensors]
    faults += [f"{name} is unknown to the model" for name in tensors if name not in own]
    faults += [
        f"{name} is {list(tensors[name].shape)}, the model's {list(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise CheckpointError(f"{source} does not fit the model: {shown}")
    module.load_state_dict(tensors)
