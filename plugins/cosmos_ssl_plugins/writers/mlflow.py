"""MLflow."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

from torch import Tensor

from cosmos_ssl.api import Aside, RunInfo, Spec, Writer
from cosmos_ssl_plugins.writers.package import check_package

TAG = "cosmos_ssl.run"


class Mlflow(Writer):
    """A run of MLflow with the run's own id as the tag ``cosmos_ssl.run``: what is started again goes on in it.

    ``experiment``: where it is shown.
    ``tracking_uri``: the server, or a folder (``file:PATH``); null: as ``MLFLOW_TRACKING_URI`` says, else ``mlruns`` in
    the run's folder.
    """

    appends = True

    def __init__(
        self, spec: Spec, *, experiment: Aside[str] = "cosmos-ssl", tracking_uri: Aside[str | None] = None
    ) -> None:
        check_package("mlflow", "mlflow-skinny")
        self.experiment, self.tracking_uri = experiment, tracking_uri

    def start(self, run: RunInfo) -> None:
        """Find the run of this id, or make it."""
        for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", "10")):  # a server that is gone holds up no step
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        folder = (run.folder / "mlruns").absolute().as_uri()
        place = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or folder
        if place.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric, self._client = Metric, MlflowClient(place)
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self.experiment)
        runs = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'")
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, "RUNNING")
        else:
            made = self._client.create_run(experiment, tags={TAG: run.id}, run_name=run.name)
            self._run = made.info.run_id
            self._client.log_dict(self._run, dict(run.config), "config.json")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log all that are finite; ``loss/clip`` is ``loss.clip``, as a folder cannot hold it beside ``loss``."""
        now = int(time.time() * 1000)
        finite = {name.replace("/", "."): float(value) for name, value in values.items() if math.isfinite(value)}
        self._client.log_batch(self._run, metrics=[self._metric(name, x, now, step) for name, x in finite.items()])

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Log all of them as artefacts ``NAME/STEP.png``."""
        for name, picture in pictures.items():
            self._client.log_image(self._run, picture.permute(1, 2, 0).cpu().numpy(), f"{name}/{step:08d}.png")

    def close(self) -> None:
        """Mark the run as ended, until it is started again."""
        self._client.set_terminated(self._run)
