"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from cosmos_ssl.api import Aside, RunInfo, Spec, Writer
from cosmos_ssl_plugins.writers.package import check_package


class Wandb(Writer):
    """A run of Weights & Biases by the run's own id: what is started again goes on in it.

    Its files lie in the run's folder, or where ``WANDB_DIR`` says. Each start of an offline run leaves a folder there;
    ``wandb sync`` in the order of their names makes one run of them.

    ``project``: where it is shown.
    ``entity``: whose project it is; null: that of the account.
    ``mode``: ``offline`` leaves files for ``wandb sync``; null: as ``WANDB_MODE`` says, else online.
    ``tags``: by which it is found.
    """

    appends = True

    def __init__(
        self,
        spec: Spec,
        *,
        project: Aside[str] = "cosmos-ssl",
        entity: Aside[str | None] = None,
        mode: Aside[Literal["online", "offline", "disabled"] | None] = None,
        tags: Aside[list[str]] = [],  # noqa: B006 (an option's default is never changed)
    ) -> None:
        check_package("wandb")
        self.project, self.entity, self.mode, self.tags = project, entity, mode, tags

    def start(self, run: RunInfo) -> None:
        """Begin a run of this id, or go on with it."""
        import wandb

        mode = self.mode or os.environ.get("WANDB_MODE")
        self._wandb = wandb
        self._run: Any = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            tags=self.tags,
            name=run.name,
            id=run.id,
            resume=None if mode == "offline" else "allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.config),
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log all of them."""
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Log all of them."""
        shown = {name: self._wandb.Image(x.permute(1, 2, 0).cpu().numpy()) for name, x in pictures.items()}
        self._run.log(shown, step=step)

    def close(self) -> None:
        """Finish what this start adds to the run."""
        self._run.finish()
