"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cosmos_ssl.api import RunInfo, Spec, Writer


class TensorBoard(Writer):
    """Event files in ``tensorboard``; events of a run that was cut off are hidden where they come again."""

    def __init__(self, spec: Spec) -> None:
        pass

    def start(self, run: RunInfo) -> None:
        """Open a file of this start."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

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
