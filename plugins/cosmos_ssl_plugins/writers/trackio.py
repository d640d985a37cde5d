"""Trackio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cosmos_ssl.api import Aside, RunInfo, Spec, Writer
from cosmos_ssl_plugins.writers.package import check_package


class Trackio(Writer):
    """A run of Trackio by the run's name and id: what is started again goes on in it.

    Its files lie on this machine, where ``TRACKIO_DIR`` says; ``trackio show`` draws them.

    ``project``: where it is shown.
    ``space_id``: a Space of the Hugging Face hub to send all to, too; null: none.
    """

    appends = True

    def __init__(self, spec: Spec, *, project: Aside[str] = "cosmos-ssl", space_id: Aside[str | None] = None) -> None:
        check_package("trackio")
        self.project, self.space_id = project, space_id

    def start(self, run: RunInfo) -> None:
        """Begin a run of this name, or go on with it."""
        import trackio

        self._trackio = trackio
        self._run: Any = trackio.init(
            self.project,
            f"{run.name}-{run.id}",
            space_id=self.space_id,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log all of them."""
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Log all of them."""
        shown = {name: self._trackio.Image(x.permute(1, 2, 0).cpu().numpy()) for name, x in pictures.items()}
        self._run.log(shown, step=step)

    def close(self) -> None:
        """Finish what this start adds to the run."""
        self._run.finish()
