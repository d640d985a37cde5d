"""Weights of any origin, in our form: to load a model from, and to start one from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_ssl.api import Role
from cosmos_ssl.engine.checkpoint import latest_checkpoint, load_tensors
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.foreign import foreign_roles, read_foreign
from cosmos_ssl.interop.official import ROLES
from cosmos_ssl.interop.partial import load_partial
from cosmos_ssl.models.model import Model

log = logging.getLogger(__name__)


def read_weights(checkpoint: str | Path, which: Role, *, partial: bool = False) -> tuple[Path | Mapping[str, Any], Mapping[str, Tensor]]:
    """The config and the tensors of one role of a run folder, of a checkpoint, or of another program's model.

    ``partial`` takes such a model's tensors also where it has others beside, or lacks some. Raises CheckpointError for anything else.
    """
    foreign = read_foreign(checkpoint, which, partial=partial)
    if foreign is not None:
        return foreign.config, foreign.state
    folder = _checkpoint_folder(checkpoint)
    return folder.parent.parent / "config.yaml", load_tensors(folder, which)


def roles_of(checkpoint: str | Path) -> tuple[Role, ...]:
    """The roles that ``load`` finds in a checkpoint. Raises CheckpointError."""
    found = foreign_roles(checkpoint)
    if found is not None:
        return found
    folder = _checkpoint_folder(checkpoint)
    return tuple(role for role in ROLES if (folder / f"{role}.safetensors").exists())


def _checkpoint_folder(checkpoint: str | Path) -> Path:
    path = Path(checkpoint)
    folder = path if (path / "manifest.json").exists() else latest_checkpoint(path)
    if folder is None:
        raise CheckpointError(f"{path} is no run folder with a checkpoint, no checkpoint, no official file and no OpenCLIP model")
    return folder


def start_from(model: Model, checkpoint: str, *, partial: bool) -> None:
    """Start a model from the student of a checkpoint, and log what was taken over.

    The towers must be there whole unless ``partial``; heads and losses are taken where they fit. Raises CheckpointError.
    """
    _, state = read_weights(checkpoint, "student", partial=partial)
    report = load_partial(model, state, f"model.pretrained: {checkpoint}")
    left = [name for name in (*report.missing, *report.other_shapes) if not name.startswith(("heads.", "losses."))]
    if left and not partial:
        raise CheckpointError(
            f"model.pretrained: {checkpoint} does not fit the towers: {report}. Set model.pretrained_partial=true to take what fits"
        )
    log.info("starting from %s: %s", checkpoint, report)
