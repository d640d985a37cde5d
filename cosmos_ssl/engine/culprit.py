"""The search for what made a step's loss not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_ssl.api import Features, Progress
from cosmos_ssl.api.part import describe
from cosmos_ssl.api.views import tensors_in
from cosmos_ssl.engine.forward import Batch, Forward, Result
from cosmos_ssl.functional import gather_objects, world_size


def find_culprit(
    forward: Forward, result: Result, batch: Batch, progress: Progress, size: int
) -> tuple[str, Sequence[str]]:
    """The first part that is not finite, on which rank, and the samples there. A collective: all ranks call it.

    Encodes the batch once more, ``size`` samples at a time: buffers that move in that are the caller's to put back.
    """
    parts = forward.assembly.model.parts()
    values = {
        place: result.logs[log] for place in parts if (log := place.replace("losses.", "loss/", 1)) in result.logs
    }
    losses = ", ".join(parts[place] for place, value in values.items() if not value.isfinite())
    found = gather_objects((_find_part(forward, batch, progress, size), losses, batch.keys))
    at = next((r for r, (part, _, _) in enumerate(found) if part), None)
    if at is None:
        at = next((r for r, (_, loss, _) in enumerate(found) if loss), 0)
    part, loss, keys = found[at]
    on = f" on rank {at}" if world_size() > 1 else ""
    return (part or loss or "the weighted sum of the losses") + on, keys


@torch.no_grad()
def _find_part(forward: Forward, batch: Batch, progress: Progress, size: int) -> str:
    """The part before the losses whose output is not finite, for a message; empty where there is none."""
    found = ""
    for number, start in enumerate(range(0, len(batch), size)):
        forward.seed(progress, number)
        part = forward.augment(batch.slice(start, start + size))
        # all in full: heads may wait for other ranks, and so do towers of which ranks hold parts
        encoded = (("the teacher's ", forward.teacher(part)), ("", forward.student(part)))
        if not all(_finite(group.pixels) for group in part.image.values()):
            found = found or describe(forward.assembly.augmenters["image"], "augmenters.image")
        for whose, features in encoded:
            place = _unsound(features) if features is not None else None
            if place is not None:
                found = found or whose + forward.assembly.model.parts().get(place, place)
    return found


def _unsound(features: Features) -> str | None:
    """The first tower or head, as ``Model.parts`` calls it, with an output that is not finite."""
    places: dict[str, object] = {"image": features.image, "text": features.text}
    places |= {f"heads.{name}": outputs for name, outputs in features.heads.items()}
    return next((place for place, given in places.items() if not all(map(_finite, tensors_in(given)))), None)


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
