"""Writers of a run's own files: CSV, JSON lines, pictures."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from cosmos_ssl.api import Aside, LineFile, RunInfo, Spec, Writer


class Lines(Writer):
    """Base of writers of one file with lines."""

    head: ClassVar[bytes] = b""
    suffix: ClassVar[str]

    def __init__(self, file: str) -> None:
        if Path(file).name != file or Path(file).suffix != self.suffix or file == "metrics.jsonl":
            raise ValueError(f"file: '{file}' is no name of a file in the run's folder such as rows{self.suffix}")
        self.file = file

    def start(self, run: RunInfo) -> None:
        """Open the file; lines of later steps are dropped."""
        self.lines = LineFile(run.folder / self.file)
        self.lines.cut(lambda line: line == self.head or self.step_of(line) <= run.step)
        if self.head and not self.lines.lines():
            self.lines.append(self.head)

    @abstractmethod
    def step_of(self, line: bytes) -> int:
        """Return the step of a line. Raises ValueError where it has none."""

    def sync(self) -> None:
        """Flush to the disk."""
        self.lines.sync()

    def close(self) -> None:
        """Flush and close."""
        self.lines.close()


class Csv(Lines):
    """A number a line, ``step,name,value``, since not every step reports the same; one not finite is empty.

    ``file``: its name in the run's folder.
    """

    head = b"step,name,value\n"
    suffix = ".csv"

    def __init__(self, spec: Spec, *, file: Aside[str] = "metrics.csv") -> None:
        super().__init__(file)

    def step_of(self, line: bytes) -> int:
        """Read the first field."""
        return int(line.partition(b",")[0])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line for each number."""
        shown = {name: repr(float(value)) if math.isfinite(value) else "" for name, value in values.items()}
        self.lines.append("".join(f"{step},{_quoted(name)},{value}\n" for name, value in shown.items()).encode())


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(letter in name for letter in ',"\n') else name


class JsonLines(Lines):
    """An object a line, as ``metrics.jsonl`` has them; a number that is not finite is null.

    ``file``: its name in the run's folder.
    """

    suffix = ".jsonl"

    def __init__(self, spec: Spec, *, file: Aside[str] = "rows.jsonl") -> None:
        super().__init__(file)

    def step_of(self, line: bytes) -> int:
        """Read the row's ``step``."""
        return int(json.loads(line)["step"])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.lines.append(json.dumps(row).encode() + b"\n")


class Png(Writer):
    """Pictures of evaluations: ``pictures/step_00001000/NAME.png``."""

    def __init__(self, spec: Spec) -> None:
        pass

    def start(self, run: RunInfo) -> None:
        """Note the folder; a picture that comes again takes the place of the one before."""
        self.folder = run.folder / "pictures"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: pictures only."""

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Write every picture; a ``/`` of its name becomes ``-``."""
        from PIL import Image

        folder = self.folder / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(folder / f"{name.replace('/', '-')}.png")
