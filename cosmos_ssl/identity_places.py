"""What lies at a place, as a short text that a move does not change: of a file, a folder, or a run's newest checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_BLOCK, _BLOCKS = 1 << 16, 256


def fingerprint(places: str | Sequence[str]) -> str:
    """What lies at ``places``: sizes and blocks from all over the contents, or of a checkpoint its manifest.

    A name behind which there is no file here (a model on a hub) stands for itself. Up to 16 MiB are read whole. Raises OSError.
    """
    found = [_found(place) for place in ([places] if isinstance(places, str) else places)]
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()[:32]


def _found(place: str) -> str:
    path = Path(place).expanduser()
    if path.is_file():
        return _digest([("", path)])
    if not path.is_dir():
        return place
    checkpoints = [path, *sorted((path / "checkpoints").glob("step_*"), key=lambda folder: (len(folder.name), folder.name), reverse=True)]
    manifest = next((file for folder in checkpoints if (file := folder / "manifest.json").is_file()), None)
    return _digest([("", manifest)] if manifest is not None else list(_files(path)))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below a folder by their names from there, without hidden ones."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inner.parts):
            yield inner.as_posix(), path


def _digest(files: Sequence[tuple[str, Path]]) -> str:
    """A hash over names, sizes, and blocks spread evenly over each file; ``_BLOCKS`` of them in all."""
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode("utf-8", "surrogateescape"))
        count = min(-(-size // _BLOCK), max(_BLOCKS // len(files), 1))
        with path.open("rb") as file:
            for number in range(count):
                file.seek(number * (size - _BLOCK) // max(count - 1, 1) if size > _BLOCK else 0)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]
