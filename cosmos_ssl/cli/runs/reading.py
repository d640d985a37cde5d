"""What a run's folder says of it, read without touching it, also while the run goes on."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from cosmos_ssl.cli.runs.series import Series
from cosmos_ssl.config.source import parse_yaml
from cosmos_ssl.engine.run_folder import RunFolder
from cosmos_ssl.engine.signals import CAUSES
from cosmos_ssl.errors import UserError
from cosmos_ssl.files import QUEUED_CONFIG, checkpoint_folders, checkpoint_step, metrics_row, read_object
from cosmos_ssl.identity import leaves

LIVE = ("running", "queued")
"""States of runs that go on by themselves."""

_RECORD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)")
_ENDED = "the run ended: "
_MOST_STEPS = 2**32
_INF = math.inf


@dataclass(frozen=True, slots=True)
class Warned:
    """A line of the log from the level of warnings on, how often it came, and when last."""

    text: str
    count: int
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as its folder shows it. What is not known is None."""

    folder: Path
    name: str
    state: str
    """``running``, ``finished``, ``stopped`` (by a callback), ``interrupted`` (by a signal, or without a word: it can
    go on), ``failed``, ``queued``, or ``unknown`` where the storage cannot tell who holds the folder.
    """
    why: str = ""
    """Of the state, in words."""
    step: int = 0
    total: int | None = None
    batch: int | None = None
    hours: float = 0.0
    """Of training; evaluations are not in it."""
    rate: float | None = None
    """Samples a second over these hours."""
    mfu: float | None = None
    flops: float | None = None
    """Of a sample, where they were counted."""
    series: Mapping[str, Series] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config, by key path."""
    warnings: Sequence[Warned] = ()
    pictures: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)
    """Kind (``retrieval-student-matches``) -> step -> file."""
    notes: Sequence[str] = ()
    """What of the folder could not be read."""

    @property
    def samples(self) -> int | None:
        """Samples that it has trained on."""
        return None if self.batch is None else self.step * self.batch


@dataclass(slots=True)
class _Rows:
    """What metrics.jsonl holds."""

    series: dict[str, Series] = field(default_factory=dict)
    step: int = 0
    broken: int = 0
    """Lines that are no rows; half a line at the end is not counted, for it may be being written."""


@dataclass(slots=True)
class _Log:
    """What log.txt holds."""

    warnings: list[Warned] = field(default_factory=list)
    ended: str = ""
    """The run's last words, where these are how it ended."""


class Reader:
    """Reads runs; read again, it opens those files alone that have changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], Any]] = {}

    def read(self, path: Path, name: str) -> Run:
        """The run in a folder; what of it storage does not give is left out and noted."""
        folder, notes = RunFolder(path), list[str]()
        held = _holder(folder)
        rows: _Rows = self._once(folder.metrics, _rows, notes) or _Rows()
        log: _Log = self._once(folder.log, _log, notes) or _Log()
        config = self._config(folder, notes)
        result = _result(folder, notes)
        state, why = held or _ended(folder, result, log)
        if rows.broken:
            notes.append(f"{folder.metrics.name}: {rows.broken:,} lines are no rows and are left out")
        batch = _whole(config.get("training.batch_size"))
        saved = [checkpoint_step(each) or 0 for each in checkpoint_folders(path)[-1:]]
        step = max([rows.step, *saved, *([] if result is None else [int(result["step"])])])
        hours, mfu = _hours(rows.series, batch, _start(folder))
        steps = rows.series["samples_per_second"].steps if hours else []
        trained = (steps[-1] - _start(folder)) * (batch or 0) if steps else 0
        return Run(
            folder=path,
            name=name,
            state=state,
            why=why,
            step=step,
            total=_total(config, rows.series, result, state),
            batch=batch,
            hours=hours,
            rate=trained / hours / 3600 if hours else None,
            mfu=mfu,
            series=rows.series,
            config=config,
            warnings=log.warnings,
            pictures=_pictures(path / "pictures"),
            notes=notes,
        )

    def _once(self, path: Path, read: Any, notes: list[str]) -> Any:
        """What ``read`` makes of a file; None where it is not there, or cannot be read, which is noted."""
        try:
            found = path.stat()
            stamp = found.st_mtime_ns, found.st_size
            if path not in self._known or self._known[path][0] != stamp:
                self._known[path] = stamp, read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            notes.append(f"{path.name} cannot be read: {error.strerror}")
            return None
        return self._known[path][1]

    def _config(self, folder: RunFolder, notes: list[str]) -> dict[str, Any]:
        """The resolved config by key path: of identity.json, which is read a hundred times as fast, or the YAML."""
        try:
            identity = folder.identity()
            if identity is not None:
                return dict(leaves(identity.config))
        except UserError:
            pass  # the YAML says the same
        for path in (folder.config, folder.path / QUEUED_CONFIG):
            try:
                found = self._once(
                    path, lambda p: parse_yaml(p.read_text("utf-8", "replace"), str(p), []).plain(), notes
                )
            except UserError as error:
                notes.append(str(error).partition("\n")[0])
                continue
            if isinstance(found, dict):
                return dict(leaves(found))
        return {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _rows(path: Path) -> _Rows:
    """Read a metrics.jsonl once, line by line."""
    found = _Rows()
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            row = metrics_row(line, from_json)
            if row is None or not 0 <= row["step"] < _MOST_STEPS:
                found.broken += 1
                continue
            step = found.step = row.pop("step")
            for name, value in row.items():
                number = value if type(value) is float and -_INF < value < _INF else _number(value)
                if number is None:
                    continue
                series = found.series.get(name)
                if series is None:
                    series = found.series[name] = Series()
                series.add(step, number)
    return found


def _number(value: Any) -> float | None:
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _log(path: Path) -> _Log:
    found, last, counts, times = _Log(), "", Counter[str](), dict[str, str]()
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _RECORD.match(line)
            if record is None:  # of a record of several lines, such as a traceback
                continue
            time, level, last = record.groups()
            if level in ("WARNING", "ERROR", "CRITICAL"):
                counts[last] += 1
                times[last] = time
    found.warnings = [Warned(text, count, times[text]) for text, count in counts.items()]
    found.ended = last.removeprefix(_ENDED) if last.startswith(_ENDED) else ""
    return found


def _holder(folder: RunFolder) -> tuple[str, str] | None:
    """State and reason of a run that goes on; None where it does not."""
    try:
        holder = folder.holder()
    except OSError as error:
        return "unknown", f"its lock cannot be asked: {error.strerror}"
    return None if holder is None else ("running", holder)


def _result(folder: RunFolder, notes: list[str]) -> dict[str, Any] | None:
    try:
        return folder.result()
    except UserError as error:
        notes.append(str(error).partition(". ")[0])
        return None


def _ended(folder: RunFolder, result: Mapping[str, Any] | None, log: _Log) -> tuple[str, str]:
    """State and reason of a run that no process holds."""
    if result is not None:
        early = result.get("stopped")
        return ("stopped", f"by {', '.join(map(str, early))}") if early else ("finished", "")
    if log.ended:
        return "interrupted" if log.ended.startswith(CAUSES) else "failed", log.ended
    if not folder.log.exists():
        return ("queued", "") if (folder.path / QUEUED_CONFIG).exists() else ("interrupted", "before it began")
    return "interrupted", "without a word: it was killed, or its machine was lost"


def _start(folder: RunFolder) -> int:
    """The step that a run began with: not 0 where it goes on from another."""
    try:
        found = read_object(folder.fork, {"step": int}, "") if folder.fork.exists() else {}
    except UserError:
        return 0
    return int(found.get("step", 0))


def _total(
    config: Mapping[str, Any], series: Mapping[str, Series], result: Mapping[str, Any] | None, state: str
) -> int | None:
    """Steps of the whole run, by its schedule and the steps of an epoch, which the rows tell."""
    if result is not None and state == "finished":
        return int(result["step"])
    most, epochs = _whole(config.get("schedule.max_steps")), _whole(config.get("schedule.epochs"))
    if "epoch" not in series or epochs is None:
        return None
    step, epoch = series["epoch"].last()
    if epoch <= 0:
        return None
    wanted = epochs * round(step / epoch)
    return min(wanted, most or wanted)


def _hours(series: Mapping[str, Series], batch: int | None, start: int) -> tuple[float, float | None]:
    """Hours of training, by the samples and the rate of each row, and MFU over them."""
    rates = series.get("samples_per_second")
    if rates is None or batch is None:
        return 0.0, None
    seconds, before = dict[int, float](), start
    for step, rate in zip(rates.steps, rates.values, strict=True):
        seconds[step] = max(step - before, 0) * batch / rate if rate > 0 else 0.0
        before = step
    mfu = series.get("mfu")
    known = 0.0 if mfu is None else sum(seconds.get(step, 0.0) for step in mfu.steps)
    if mfu is None or not known:
        return sum(seconds.values()) / 3600, None
    used = sum(seconds.get(step, 0.0) * value for step, value in zip(mfu.steps, mfu.values, strict=True))
    return sum(seconds.values()) / 3600, used / known


def _pictures(folder: Path) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("step_*/*.png")):
        step = checkpoint_step(path.parent)
        if step is not None:
            found.setdefault(path.stem, {})[step] = path
    return found
