"""Files of tensors and of JSON: looked at before they are read, so that none takes more memory than it has bytes."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.errors import CheckpointError

MAX_HEADER = 1 << 22
"""Bytes of a safetensors header: some 30,000 tensors. Larger ones are refused before they are read."""
MAX_JSON = 1 << 26
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
"""Types of weights; a model takes any of them as its own."""


def read_tensor_file(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The table in a file of torch or safetensors, and what its metadata tells. Raises CheckpointError.

    Tensors of both stay in the file until their values are used; nothing in it is executed.
    """
    if path.suffix == ".safetensors":
        metadata, tensors = read_safetensors(path)
        return tensors, metadata
    return read_torch_file(path), {}


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises CheckpointError."""
    from safetensors import safe_open

    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise CheckpointError(
                f"{path} cannot be read: its header is of {header:,} bytes, at most {MAX_HEADER:,} are read"
            )
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of safetensors, and of torch for what it has no type or no room for
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error


def weights_of(folder: Path, config: str, names: Sequence[str]) -> Path:
    """The file of weights in a folder, the first of these names. Raises CheckpointError where there is none."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds {config} and no weights, such as {names[0]}")
    return found


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], entry: tuple[str, str] = ("format", "pt")) -> None:
    """Write a safetensors file that others may read as the umask says; with one entry of metadata, as the order of
    several is by chance.

    Raises OSError.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict([entry]))  # makes it its owner's alone
    path.chmod(mode)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file. Raises OSError."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_torch_file(path: Path) -> Mapping[str, Any]:
    """The table in a file of ``torch.save``, in host memory; nothing in it is executed. Raises CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old and strange forms: judged below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, or is no torch file; it is not opened, since that "
            "could run code"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (
        Exception
    ) as error:  # what torch.load raises for a cut or foreign file is not documented, and differs by its version
        raise CheckpointError(f"{path} cannot be read as a torch file: {_first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not the table of an official COSMOS checkpoint"
        )
    return content


def _is_archive(path: Path) -> bool:
    """Return whether a torch file is an archive (since torch 1.6), which can stay on the disk.

    Refuses one that would grow when read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(path) as archive:
        packed = next(
            (entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED), None
        )
    if packed is not None:
        raise CheckpointError(
            f"{path} cannot be read as a torch file: {packed} is compressed, which torch.save does not do"
        )
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        value = json.loads(path.read_bytes()) if size <= MAX_JSON else None
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
    if size > MAX_JSON:
        raise CheckpointError(f"{path} cannot be read: it has {size:,} bytes, at most {MAX_JSON:,} are read")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no table")
    return value


# ---------------------------------------------------------------------------- weights


def check_weights(state: Mapping[str, Tensor], source: object) -> None:
    """Raise CheckpointError for tensors that are no weights, before one is computed with.

    None of their values is read.
    """
    for name, tensor in state.items():
        counter = name.endswith(".num_batches_tracked") and tensor.dtype == torch.int64 and not tensor.dim()
        if not counter and (fault := _oddity(tensor)):
            raise CheckpointError(f"{source}: {name} is {fault}; weights are dense, of 32 or 16 bits")


def _oddity(tensor: Tensor) -> str | None:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return f"a tensor of another kind ({'meta' if tensor.is_meta else tensor.layout})"
    if tensor.dtype not in WEIGHTS:
        return f"of {tensor.dtype}"
    stored = tensor.untyped_storage().nbytes()
    return f"of {tensor.numel():,} numbers, {stored:,} bytes of which are stored" if tensor.nbytes > stored else None


def same_kind(tensor: Tensor, value: Tensor) -> bool:
    """Return whether ``tensor`` may be copied into ``value`` as a number of its kind."""
    return tensor.dtype == value.dtype or (tensor.dtype in WEIGHTS and value.dtype in WEIGHTS)


def find_nonfinite(tensors: Mapping[str, Tensor], buffers: Collection[str] = ()) -> str | None:
    """The name of a tensor with a NaN or an infinity in it, or None; ``buffers`` may hold infinities, as masks do."""
    for name, tensor in tensors.items():
        if tensor.dtype in (*WEIGHTS, torch.float64) and tensor.numel():
            ends = torch.stack(tensor.aminmax())  # NaN where any number is
            if ends.isnan().any() or (name not in buffers and ends.isinf().any()):
                return name
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
