"""A checkpoint in several files a role, written again as one file a role."""

from __future__ import annotations

import shutil
from pathlib import Path

from cosmos_ssl.engine.checkpoint import Snapshot, load_tensors, read_state, save_checkpoint
from cosmos_ssl.engine.layout import roles_in
from cosmos_ssl.engine.remote import RUN_FILES


def merge(checkpoint: Path, output: Path) -> Path:
    """Write a sound checkpoint of a run into the run folder ``output``; its folder there.

    What else belongs to the run goes along, but its id: so the run can go on there, too. Tensors are read as they are
    written. Raises OSError, CheckpointError.
    """
    tensors = {role: load_tensors(checkpoint, role) for role in roles_in(checkpoint)}
    trained = {name.rpartition(".")[0] for name in tensors.get("optimizer", ())}
    state = {key: value for key, value in read_state(checkpoint).items() if key != "format"}
    buffers = {name for held in tensors.values() for name in held} - trained
    output.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        found = checkpoint.parent.parent / name
        if name != "id" and found.exists():
            shutil.copyfile(found, output / name)
    return save_checkpoint(output, Snapshot(step=state["step"], tensors=tensors, state=state, buffers=buffers))
