"""Going on from another run's checkpoint under a changed config: its weights, teacher, optimiser and place in the data
are taken over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cosmos_ssl.config import Config
from cosmos_ssl.data.order import Order
from cosmos_ssl.engine.assembly import make_order, total_steps
from cosmos_ssl.engine.checkpoint import find_fault, latest_checkpoint, read_state
from cosmos_ssl.engine.rollback import ahead
from cosmos_ssl.engine.run_folder import RunFolder, write_text
from cosmos_ssl.errors import CheckpointError, UserError
from cosmos_ssl.files import checkpoint_step, run_path
from cosmos_ssl.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Where a run starts that goes on from another one."""

    checkpoint: Path
    saved_step: int
    """The step of the checkpoint."""
    step: int
    """The step of this run that it stands for; another one where the batch size is another."""
    skipped: int
    """Batches of this run by which the order of samples is ahead of it (``engine.rollback``)."""
    changed: tuple[str, ...]
    """What of the identity differs, as ``optimizer.lr: 0.001 -> 0.01``."""

    def __str__(self) -> str:
        changed = f" with {', '.join(self.changed)}" if self.changed else ""
        return f"forked from {self.checkpoint.parent.parent} at step {self.saved_step:,}{changed}"


# ---------------------------------------------------------------------------- what a folder knows of it


def told_fork(folder: RunFolder) -> Path | None:
    """The checkpoint that the run in ``folder`` goes on from by its ``fork.json``; None for one of its own.

    Raises UserError.
    """
    if not folder.fork.exists():
        return None
    try:
        return Path(json.loads(folder.fork.read_text())["checkpoint"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder.fork} is damaged. Give another output_dir, or delete the file where the run has checkpoints"
        ) from error


def fork_source(folder: RunFolder, source: str | Path) -> Path | None:
    """The checkpoint that a run in ``folder`` is to go on from; None where it has begun, as a fork of it.

    ``source`` is a run folder (its newest sound checkpoint) or one of its checkpoints. Raises UserError where the
    folder is that of the source or of another run, CheckpointError where there is no sound checkpoint.
    """
    path = run_path(source).resolve()
    named = checkpoint_step(path) is not None
    run = path.parent.parent if named else path
    if run == folder.path.resolve():
        raise UserError(f"--fork: {source} is the run folder itself. Give the run with the changes another output_dir")
    if folder.identity() is not None:
        known = told_fork(folder)
        if known is None or (known != path if named else known.parent.parent != run):
            raise UserError(
                f"run folder {folder.path} is no fork of {source}. Give another output_dir, or leave out --fork "
                "to go on with it"
            )
        return None
    checkpoint = path if named else latest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"--fork: {source} is no run folder with a sound checkpoint")
    if named and (fault := find_fault(path)) is not None:
        raise CheckpointError(f"--fork: {source} cannot be used: {fault}")
    return checkpoint


def ask_fork(folder: RunFolder, source: str | Path) -> None:
    """Note in a claimed ``folder`` what its run goes on from when it starts. Raises as ``fork_source``."""
    checkpoint = fork_source(folder, source)
    if checkpoint is not None:
        write_text(folder.fork, json.dumps({"checkpoint": str(checkpoint)}, indent=1))


def note_fork(folder: RunFolder, fork: Fork) -> None:
    """Write down what was taken over, and what has changed."""
    told = {
        "checkpoint": str(fork.checkpoint),
        "saved_step": fork.saved_step,
        "step": fork.step,
        "changed": list(fork.changed),
    }
    write_text(folder.fork, json.dumps(told, indent=1))


@contextmanager
def refusing(folder: RunFolder) -> Iterator[None]:
    """Forget what a folder was asked to go on from where that is refused, so that it is free as before."""
    try:
        yield
    except UserError:
        if folder.identity() is None:
            folder.fork.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------- where it starts


def plan_fork(checkpoint: Path, mine: Identity, config: Config, shard_sizes: NDArray[np.int64]) -> Fork:
    """Return where a run of this identity, config and data starts that goes on from ``checkpoint``.

    Raises UserError where it cannot.
    """
    run = checkpoint.parent.parent
    theirs = RunFolder(run).identity()
    if theirs is None:
        raise CheckpointError(f"--fork: {checkpoint} lies in no run folder: there is no {run / 'identity.json'}")
    changed, moved = mine.config_changes(theirs), mine.data_changes(theirs)
    for change in changed:
        path = change.partition(": ")[0]
        overridden = path.startswith("model.pretrained") and config.model.pretrained is not None
        if (
            overridden
            or path in ("teacher.type", "optimizer.type", "optimizer.name")
            or (path.startswith("teacher.") and path in mine.places)
        ):
            raise UserError(
                f"--fork: {change}: weights, teacher and optimiser are taken over from {run}, so this cannot change. "
                "Leave it as it was"
            )
    if moved and config.loader.changed_data != "accept":
        raise UserError(
            f"--fork: the data are not those of {run} ({', '.join(moved)}). To go on with these: "
            "loader.changed_data=accept"
        )
    state, order = read_state(checkpoint), make_order(config, shard_sizes)
    saved = state["step"]
    step, place = (_step(at, theirs, shard_sizes, order, moved=bool(moved)) for at in (saved, saved + ahead(state)))
    end = total_steps(config, order)
    if step >= end:
        raise UserError(
            f"--fork: {run} stands at step {step:,}, and this run would end at {end:,}. Give more "
            "schedule.epochs or max_steps"
        )
    return Fork(checkpoint=checkpoint, saved_step=saved, step=step, skipped=place - step, changed=(*changed, *moved))


def _step(saved: int, theirs: Identity, shard_sizes: NDArray[np.int64], order: Order, *, moved: bool) -> int:
    """The step that stands for the source's; of other data the same number, as for a run that goes on with them."""
    try:
        config = Config.model_validate_json(json.dumps(theirs.config))
    except ValidationError as error:
        raise CheckpointError(
            f"--fork: the source's config is of another version: {error.errors()[0]['msg']}"
        ) from error
    if not moved:
        try:
            return order.step_after(make_order(config, shard_sizes), saved)
        except UserError as error:
            raise UserError(f"--fork: {error}") from error
    if config.training.batch_size != order.batch_size:
        raise UserError(
            "--fork: data and training.batch_size cannot both change. Fork with one of the changes, then with the other"
        )
    return saved
