"""Where a run's numbers and pictures go: its own metrics.jsonl, and the writers that it is given."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cosmos_ssl import api, registry
from cosmos_ssl.api.part import describe
from cosmos_ssl.config.sections import LoggingConfig
from cosmos_ssl.files import LineFile, metrics_row, set_aside, written_whole

log = logging.getLogger(__name__)

FAILURES = 3
"""In a row, after which a writer is left alone."""


class Writer(Protocol):
    """What an object given in Python must do; parts (``cosmos_ssl.api.Writer``) are such too. May raise OSError."""

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


def default_writers(spec: api.Spec, logging: LoggingConfig) -> dict[str, api.Writer]:
    """What every run has unless its config names one of the type: pictures as files and, if asked for, TensorBoard."""
    wanted = {"png", *(["tensorboard"] if logging.tensorboard else [])} - {
        each.type for each in logging.writers.values()
    }
    found = {}
    for name in sorted(wanted):
        found[name] = registry.load(registry.find("writers", f"{registry.OWN}:{name}"))(spec)
        found[name].part_name = name
    return found


class JsonLines:
    """``metrics.jsonl``: one object a line; numbers that are not finite are null."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)
        self.sync, self.close = self._file.sync, self._file.close

    def cut(self, step: int) -> None:
        """Drop the rows after ``step``."""
        self._file.cut(lambda line: json.loads(line)["step"] <= step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.append(json.dumps(row).encode() + b"\n")

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Nothing: a row holds numbers."""


class Writers(api.Writer):
    """All writers of a run as one. Storage that fails is reported once a writer, and training goes on.

    So it does whatever else a part raises; what an object given in Python raises ends the run.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        run: api.RunInfo | None = None,
        reported: Mapping[int, frozenset[str]] | None = None,
    ) -> None:
        """``run``: what parts are started with, at once; ``reported``: names by step, from ``run.step`` on, which come
        again.
        """
        self._writers = [_Guarded(writer, run) for writer in writers]
        self._kept = -1 if run is None else run.step
        self._reported = reported or {}
        for writer in self._writers:
            writer.call("start")

    def drop_rows(self, step: int) -> None:
        """Drop the rows of metrics.jsonl after ``step``. Raises OSError."""
        for writer in self._writers:
            writer.drop_rows(step)

    def restart(self, run: api.RunInfo, reported: Mapping[int, frozenset[str]]) -> None:
        """Go on from ``run.step`` of a new segment, with names ``reported`` of it: every part is started anew.

        Parts that can take back what comes again do so, and those that append begin another run.
        """
        self._kept, self._reported = run.step, reported
        for writer in self._writers:
            writer.restart(run)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on to all, but nothing twice to those that append, or of the step that the run goes on from."""
        known = self._reported.get(step, frozenset())
        fresh = {name: value for name, value in values.items() if name not in known}
        for writer in self._writers:
            given = fresh if writer.appends or step == self._kept else values
            if not given.keys() <= {"epoch"}:
                writer.call("scalars", step, given)

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Hand on to all, if there are any; an evaluator's pictures come with its numbers."""
        known = {name.partition("/")[0] for name in self._reported.get(step, ())}
        fresh = {name: picture for name, picture in pictures.items() if name.partition("/")[0] not in known}
        for writer in self._writers:
            if given := fresh if writer.appends else pictures:
                writer.call("pictures", step, given)

    def sync(self) -> None:
        """Hand on to all."""
        for writer in self._writers:
            writer.call("sync")

    def close(self) -> None:
        """Hand on to all."""
        for writer in self._writers:
            writer.call("close")


class _Guarded:
    """One writer, whose failures cost a warning; it is started when it is first called, and again where that failed."""

    def __init__(self, writer: Writer, run: api.RunInfo | None) -> None:
        self._writer = writer
        self._part = writer if isinstance(writer, api.Writer) else None
        self._started = self._part is None
        self._warned, self._failures = False, 0
        self.appends = self._part is not None and self._part.appends
        self._run = run and self._own_run(run)

    @property
    def _name(self) -> str:
        part = self._part
        return describe(part, f"logging.writers.{part.part_name}") if part else type(self._writer).__name__

    def _own_run(self, run: api.RunInfo) -> api.RunInfo:
        """Return ``run`` as the writer sees it: a segment after the first is another run to one that appends."""
        if not self.appends or run.segment == 1:
            return run
        return replace(run, id=f"{run.id}-{run.segment}", name=f"{run.name}-segment-{run.segment}")

    def drop_rows(self, step: int) -> None:
        if isinstance(self._writer, JsonLines):
            self._writer.cut(step)

    def restart(self, run: api.RunInfo) -> None:
        if self._part is not None:
            self.call("close")
            self._run, self._started = self._own_run(run), False
            self.call("start")

    def call(self, method: str, *given: Any) -> None:
        if self._failures == FAILURES or (method == "close" and not self._started):
            return
        try:
            if self._part is not None and self._run is not None and not self._started:
                self._part.start(self._run)
                self._started = True
            if method != "start":
                getattr(self._writer, method)(*given)
            self._failures = 0
        except (Exception, SystemExit) as error:
            storage = isinstance(error, OSError)
            if self._part is None and not storage:
                raise
            if not self._warned:
                self._warned = True
                told = str(error).partition("\n")[0] or type(error).__name__
                log.warning("%s cannot write: %s; training goes on", self._name, told)
            self._failures += not storage
            if self._failures == FAILURES:
                log.warning("%s has failed %s times in a row and is left alone", self._name, FAILURES)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl; what a crash cut off, and what is no row, is left out."""
    yield from (row for _, row in _lines(path) if row is not None)


def metrics_at(path: Path, step: int, first: int | None = None) -> dict[str, float]:
    """All that the rows of a metrics.jsonl say of one step, or the last that they say from step ``first`` to it."""
    rows = (row for row in read_rows(path) if (step if first is None else first) <= row["step"] <= step)
    return {
        name: value for row in rows for name, value in row.items() if name != "step" and isinstance(value, int | float)
    }


def names_from(path: Path, step: int) -> dict[int, frozenset[str]]:
    """The names in the rows of a metrics.jsonl from ``step`` on, by step, without those of every row."""
    found: dict[int, frozenset[str]] = {}
    for row in read_rows(path):
        if row["step"] >= step:
            found[row["step"]] = found.get(row["step"], frozenset()) | (row.keys() - {"step", "epoch"})
    return found


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
            yield line, metrics_row(line) if line.endswith(b"\n") else None
