"""Where a run's numbers and pictures go: metrics.jsonl, TensorBoard, PNG files, and whatever else is asked for."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cosmos_ssl.files import set_aside, written_whole

log = logging.getLogger(__name__)


class Writer(Protocol):
    """Takes what a run reports. ``step`` is the number of optimiser steps done. May raise OSError."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One logged step, or one evaluation."""
        ...

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Pictures of one evaluation, uint8 [3, H, W]."""
        ...

    def sync(self) -> None:
        """Bring everything to the disk: a checkpoint follows."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class JsonLines:
    """``metrics.jsonl``: one object a line; numbers that are not finite are null.

    On a full disk, rows wait in memory and the file keeps whole lines only.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._handle).st_size
        self._waiting = b""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._waiting += json.dumps(row).encode() + b"\n"
        self._flush()

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Nothing: a row holds numbers."""

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
                raise OSError(28, "No space left on device")
        except OSError:
            os.ftruncate(self._handle, self._size)
            raise
        self._size += done
        self._waiting = b""


class TensorBoard:
    """TensorBoard's event files. Events at ``purge_step`` and later, of a run that was cut off, are hidden."""

    def __init__(self, path: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(path), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Every number under its own name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Every picture under its own name."""
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step)

    def sync(self) -> None:
        """Flush."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class PngFiles:
    """``pictures/step_00001000/NAME.png``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: pictures only."""

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Write every picture; a ``/`` of its name becomes ``-``."""
        from PIL import Image

        folder = self.path / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(folder / f"{name.replace('/', '-')}.png")

    def sync(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


class Writers:
    """All writers of a run as one. Storage that fails is reported once a writer, and training goes on."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers
        self._failed: set[int] = set()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on to all."""
        for writer in self._writers:
            self._try(writer, partial(writer.scalars, step, values))

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Hand on to all, if there are any."""
        if pictures:
            for writer in self._writers:
                self._try(writer, partial(writer.pictures, step, pictures))

    def sync(self) -> None:
        """Hand on to all."""
        for writer in self._writers:
            self._try(writer, writer.sync)

    def close(self) -> None:
        """Hand on to all."""
        for writer in self._writers:
            self._try(writer, writer.close)

    def _try(self, writer: Writer, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            if id(writer) not in self._failed:
                self._failed.add(id(writer))
                log.warning("%s cannot write: %s; training goes on", type(writer).__name__, error)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl; what a crash cut off, and what is no row, is left out."""
    yield from (row for _, row in _lines(path) if row is not None)


def metrics_at(path: Path, step: int) -> dict[str, float]:
    """All that the rows of a metrics.jsonl say of one step."""
    rows = (row for row in read_rows(path) if row["step"] == step)
    return {
        name: value for row in rows for name, value in row.items() if name != "step" and isinstance(value, int | float)
    }


def cut_rows(path: Path, step: int) -> None:
    """Drop the rows after ``step``, and a line that a crash cut off.

    Where other lines are no rows, the file is kept aside.
    """
    if not path.exists():
        return
    kept, damaged = [], 0
    for line, row in _lines(path):
        if row is not None and row["step"] <= step:
            kept.append(line)
        damaged += row is None and line.endswith(b"\n")
    with written_whole(path) as file:
        file.writelines(kept)
        if damaged:
            aside = set_aside(path).name
            log.warning("%s: %d lines are no rows and are left out; the file is kept as %s", path, damaged, aside)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file, and the row that each is."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            yield line, _row(line) if line.endswith(b"\n") else None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
