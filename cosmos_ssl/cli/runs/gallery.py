"""Pictures of runs for a page: small, of the steps that tell the most, and within a bound for all together."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

from cosmos_ssl.cli.runs.reading import Run
from cosmos_ssl.errors import BadSample
from cosmos_ssl.pictures import open_rgb

PIXELS = 640_000
"""Of a picture at most."""
BYTES = 12 << 20
"""Of all pictures of a page, before base64 adds a third."""
_GUESS = 40_000  # bytes of a picture of that size
_QUALITY = 78


class Gallery:
    """Makes the pictures small; those that it has made before are not made again."""

    def __init__(self, budget: int = BYTES) -> None:
        self.budget = budget
        self._made: dict[tuple[Path, int, int], bytes | None] = {}

    def pictures(self, runs: Sequence[Run]) -> tuple[list[dict[str, dict[int, str]]], int]:
        """Of each run: kind -> step -> data URI; and how many pictures were left out.

        Steps are thinned evenly, alike in all runs, until all have room; the last step of each run comes first.
        """
        steps = sorted({step for run in runs for by_step in run.pictures.values() for step in by_step})
        total = sum(len(by_step) for run in runs for by_step in run.pictures.values())
        keep = set(_spread(steps, self.budget // _GUESS * len(steps) // max(total, 1)))
        found: list[dict[str, dict[int, str]]] = [{} for _ in runs]
        size = shown = 0
        for run, step, kind, path in self._in_order(runs, keep):
            data = self._small(path) if size < self.budget else None
            if data is not None and size + len(data) <= self.budget:
                size += len(data)
                shown += 1
                found[run].setdefault(kind, {})[step] = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
        return found, total - shown

    def _in_order(self, runs: Sequence[Run], keep: set[int]) -> list[tuple[int, int, str, Path]]:
        """Run, step, kind and path of what is to be shown: the last of each kind first, then from the newest back."""
        every = [
            (step != max(by_step), -step, number, kind, path)
            for number, run in enumerate(runs)
            for kind, by_step in run.pictures.items()
            for step, path in by_step.items()
            if step in keep or step == max(by_step)
        ]
        return [(number, -step, kind, path) for _, step, number, kind, path in sorted(every)]

    def _small(self, path: Path) -> bytes | None:
        """A picture as WebP; None where it cannot be read, or is being written."""
        try:
            found = path.stat()
            key = path, found.st_mtime_ns, found.st_size
            if key not in self._made:
                self._made[key] = _webp(path)
            return self._made[key]
        except OSError:
            return None


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """So many of some steps, evenly, the first and the last among them."""
    if count >= len(steps):
        return list(steps)
    if count < 2:
        return list(steps[-1:])
    return [steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)]


def _webp(path: Path) -> bytes | None:
    try:
        picture = open_rgb(path)
    except BadSample:
        return None
    share = min(1.0, math.sqrt(PIXELS / (picture.width * picture.height)))
    picture.thumbnail((max(1, int(picture.width * share)), max(1, int(picture.height * share))))
    picture.save(file := io.BytesIO(), "webp", quality=_QUALITY, method=2)
    return file.getvalue()
