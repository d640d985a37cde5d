"""Segments of a run: what services that can only append have received, and when they must begin anew.

Steps that come again after a crash have the same values, and such a service is not given them twice. Steps that are
replaced, since the run goes back or is extended, begin a new segment, which such a service stores as another run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cosmos_ssl.engine.metrics import names_from
from cosmos_ssl.errors import UserError
from cosmos_ssl.files import read_object, written_whole

FILE = "segment.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The segment that a run is in."""

    number: int = 1
    reported: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Names that were reported in it, by step; none of steps before the last checkpoint."""


def read_segment(run_dir: Path) -> Segment:
    """Return what ``segment.json`` holds; the first segment if there is none. Raises UserError for a damaged file."""
    path = run_dir / FILE
    if not path.exists():
        return Segment()
    advice = "It numbers the runs in wandb and the like: delete it, and they go on in the first"
    content = read_object(path, {"number": int, "reported": dict}, advice)
    try:
        reported = {int(step): frozenset(map(str, names)) for step, names in content["reported"].items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}. {advice}") from error
    return Segment(number=content["number"], reported=reported)


def save_reported(run_dir: Path, step: int) -> Segment:
    """Save what was reported from ``step`` on, before these rows are dropped from metrics.jsonl.

    A run that is killed more than once loses the rows, but not what services have received.
    """
    before, rows = read_segment(run_dir), names_from(run_dir / "metrics.jsonl", step)
    steps = sorted(each for each in {*before.reported, *rows} if each >= step)
    reported = {each: before.reported.get(each, frozenset()) | rows.get(each, frozenset()) for each in steps}
    segment = Segment(number=before.number, reported=reported)
    if segment != before:
        _write(run_dir, segment)
    return segment


def begin_segment(run_dir: Path, step: int, drop_rows: Callable[[int], None], *, same_until: int | None = None) -> None:
    """Begin a new segment after ``step``, unless nothing was reported of the steps that are replaced.

    ``drop_rows`` drops the rows after ``step`` from metrics.jsonl. Steps up to ``same_until`` (default: ``step``) come
    again with the same values.
    """
    segment = save_reported(run_dir, step)
    if max(segment.reported, default=0) > (step if same_until is None else same_until):
        drop_rows(step)  # before the number is raised: what is left of metrics.jsonl belongs to the segment
        _write(run_dir, Segment(number=segment.number + 1))


def _write(run_dir: Path, segment: Segment) -> None:
    reported = {str(step): sorted(names) for step, names in segment.reported.items()}
    with written_whole(run_dir / FILE) as file:
        file.write(json.dumps({"number": segment.number, "reported": reported}).encode() + b"\n")
