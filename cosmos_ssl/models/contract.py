"""Holds parts to the contract while they run, and says whose part broke it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_ssl import registry
from cosmos_ssl.api import (
    CropGroup,
    Evaluation,
    GroupFeatures,
    GroupPlan,
    Head,
    HeadOutput,
    ImageGroup,
    LossOutput,
    MatchingHead,
    Modality,
    Need,
    Part,
    PluginError,
    Tower,
    TowerSpec,
    ViewSpec,
)
from cosmos_ssl.api.part import describe
from cosmos_ssl.api.views import tensors_in
from cosmos_ssl.errors import CosmosError, is_lost_rank


def is_built_in(part: object, group: str, name: str) -> bool:
    """Return whether a part is the built-in one of this name, and no other package's or derived one."""
    return type(part) is registry.load(registry.find(group, f"{registry.OWN}:{name}"))


def is_matching(head: object) -> TypeGuard[MatchingHead]:
    """Return whether pictures and texts match by this head."""
    return isinstance(head, MatchingHead) and head.matches


class Fault(Exception):
    """A breach of the contract, in words for the part's author."""


@contextmanager
def blaming(part: Part, place: str) -> Iterator[None]:
    """Say whose part failed where it is another package's; what fails in our own is our fault, and keeps its traceback.

    No part may end the process: whose calls ``sys.exit`` has failed.
    """
    try:
        yield
    except Fault as error:
        raise PluginError(f"{describe(part, place)} {error}") from None
    except (CosmosError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        ours = not part.part_source and not isinstance(error, SystemExit)
        if ours or is_lost_rank(error):
            raise
        reason = str(error).strip().splitlines() or ["no message"]
        raise PluginError(f"{describe(part, place)} failed: {type(error).__name__}: {reason[0]}") from error


# ---------------------------------------------------------------------------- what parts say of themselves


def checked_tower(tower: Tower, modality: Modality) -> Tower:
    """A tower that is built. Raises Fault."""
    if tower.modality != modality:
        raise Fault(f"encodes {tower.modality}s, expected a tower of {modality}s")
    if not isinstance(getattr(tower, "spec", None), TowerSpec):
        raise Fault("has no spec, expected self.spec = TowerSpec(width=...)")
    return tower


def checked_offers(offers: object) -> Mapping[str, ViewSpec]:
    """The view groups of an augmenter. Raises Fault."""
    if (
        not isinstance(offers, Mapping)
        or not offers
        or not all(isinstance(v, ViewSpec) and v.views > 0 for v in offers.values())
    ):
        raise Fault(
            f"offers {offers!r}, expected a mapping of group names to ViewSpec(views=...) with at least one view each"
        )
    return offers


def checked_widths(outputs: object) -> dict[str, int]:
    """The widths of a head's outputs. Raises Fault."""
    if not isinstance(outputs, Mapping) or not all(
        isinstance(n, str) and isinstance(w, int) for n, w in outputs.items()
    ):
        raise Fault(f"gives the outputs {outputs!r}, expected a mapping of names to widths")
    return dict(outputs)


def checked_sizes(sizes: object) -> NDArray[np.int64]:
    """The samples of each shard of a data set. Raises Fault."""
    good = (
        isinstance(sizes, np.ndarray)
        and sizes.ndim == 1
        and np.issubdtype(sizes.dtype, np.integer)
        and bool((sizes >= 0).all())
    )
    if not good:
        shown = f"{sizes.dtype} {list(sizes.shape)}" if isinstance(sizes, np.ndarray) else repr(sizes)
        raise Fault(f"gives the shard_sizes {shown}, expected counts from 0 on as an array, int64 [shards]")
    return cast(NDArray[np.int64], sizes)


def checked_needs(needs: object) -> Sequence[Need]:
    """Return what a part requires. Raises Fault."""
    if not isinstance(needs, Collection) or not all(isinstance(need, Need) for need in needs):
        raise Fault(f"requires {needs!r}, expected a list of Need")
    return list(needs)


# ---------------------------------------------------------------------------- what parts return


def checked_pixels(crops: CropGroup, given: Any) -> ImageGroup:
    """Return what ``Augmenter.finish`` made of a group of crops. Raises Fault."""
    if not isinstance(given, ImageGroup | CropGroup):  # the latter by ``dataclasses.replace``
        raise Fault(f"finish returned {type(given).__name__}, expected ImageGroup")
    if not given.pixels.is_floating_point() or given.shape != crops.shape:
        wanted = [*crops.pixels.shape[:3], "H", "W"]
        raise Fault(
            f"finish returned {given.pixels.dtype} pixels {_shape(given.pixels)}, expected floats "
            f"[{', '.join(map(str, wanted))}]"
        )
    _check_floats("pixels from finish", given.pixels, crops.pixels.device)
    return given.finished(given.pixels)


def checked_features(
    tower: Tower,
    plan: Mapping[str, GroupPlan],
    samples: int,
    embed_dim: int | None,
    device: torch.device,
    given: object,
) -> dict[str, GroupFeatures]:
    """Return what a tower computed, as the plan wants it: floats on ``device``. Raises Fault."""
    if not isinstance(given, Mapping):
        raise Fault(f"returned {type(given).__name__}, expected a mapping of view groups to GroupFeatures")
    for name, wanted in plan.items():
        found = given.get(name)
        if not isinstance(found, GroupFeatures):
            raise Fault(f"returned '{name}' {_shape(found)}, expected GroupFeatures")
        if found.views != wanted.views:
            raise Fault(f"returned views {list(found.views)} of '{name}', expected {list(wanted.views)}")
        views, width = len(wanted.views), tower.spec.width
        _check(name, "pooled", found.pooled, [views, samples, width])
        if wanted.projected:
            _check(name, "projected", found.projected, [views, samples, embed_dim])
        if wanted.tokens:
            if found.token_views != wanted.tokens:
                raise Fault(
                    f"returned tokens of the views {list(found.token_views)} of '{name}', expected "
                    f"{list(wanted.tokens)}"
                )
            _check(name, "tokens", found.tokens, [len(wanted.tokens), samples, None, width])
        if wanted.masked_tokens:
            _check(name, "masked_tokens", found.masked_tokens, [None, width])
        for kind in ("pooled", "projected", "tokens", "masked_tokens"):
            if getattr(found, kind) is not None:
                _check_floats(f"{kind} of '{name}'", getattr(found, kind), device)
    return dict(given)


def checked_outputs(head: Head, wanted: Sequence[str], samples: int, device: torch.device, given: object) -> HeadOutput:
    """Return what a head computed: floats on ``device``. Raises Fault."""
    if not isinstance(given, Mapping):
        raise Fault(f"returned {type(given).__name__}, expected a mapping of outputs")
    widths = head.outputs()
    for name in wanted:
        if name not in given:
            raise Fault(f"did not return its output '{name}', but {', '.join(map(str, given)) or 'nothing'}")
        value, width = given[name], widths[name]
        good = isinstance(value, Tensor) and value.dim() in (2, 3, 4) and value.shape[-1] == width
        if not good or (value.dim() > 2 and value.shape[1] != samples):
            raise Fault(
                f"returned '{name}' {_shape(value)}, expected [V, {samples}, {width}], [V, {samples}, N, {width}] for "
                f"tokens, or [M, {width}] for masked patches"
            )
        _check_floats(f"'{name}'", value, device)
    return given


def checked_loss(output: object, device: torch.device) -> LossOutput:
    """Return what a loss computed: terms are floats on ``device``, metrics real numbers anywhere. Raises Fault."""
    if not isinstance(output, LossOutput):
        raise Fault(f"returned {type(output).__name__}, expected LossOutput(terms={{name: scalar tensor}})")
    for term, value in (*output.terms.items(), *output.metrics.items()):
        if not isinstance(term, str) or not term:
            raise Fault(f"returned a term named {term!r}, expected a name")
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise Fault(f"returned '{term}' {_shape(value)}, expected a scalar tensor")
        if term in output.terms:
            _check_floats(f"'{term}'", value, device)
        elif value.is_complex():
            raise Fault(f"returned '{term}' as {value.dtype}, expected a real number")
    if not output.terms:
        raise Fault("returned no terms")
    return output


def checked_moves(moved: object) -> dict[str, float]:
    """Return what a teacher's update says. Raises Fault."""
    if not isinstance(moved, Mapping) or not all(isinstance(n, str) and _is_number(v) for n, v in moved.items()):
        raise Fault(f"returned {moved!r} from update, expected a mapping of names to numbers")
    return dict(moved)


def checked_evaluation(found: object) -> Evaluation:
    """Return what an evaluator found. Raises Fault."""
    if not isinstance(found, Evaluation):
        raise Fault(f"returned {type(found).__name__}, expected Evaluation(metrics={{name: number}})")
    for name, value in found.metrics.items():
        if not isinstance(name, str) or not _is_number(value):
            raise Fault(f"returned {name!r}: {value!r} among its metrics, expected names and numbers")
    for name, picture in found.pictures.items():
        good = isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.dim() == 3 and len(picture) == 3
        if not good:
            kind = f"{picture.dtype} " if isinstance(picture, Tensor) else ""
            raise Fault(f"returned the picture {name!r} {kind}{_shape(picture)}, expected uint8 [3, H, W]")
    return found


@contextmanager
def untouched(*given: object) -> Iterator[None]:
    """Raise Fault where a tensor inside ``given`` was changed in place meanwhile: others read it too."""
    seen = [(tensor, tensor._version) for tensor in tensors_in(given)]
    yield
    changed = next((tensor for tensor, version in seen if tensor._version != version), None)
    if changed is not None:
        raise Fault(
            f"changed its input of shape {list(changed.shape)} in place, expected a tensor of its own (clone it first)"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def _check_floats(what: str, value: Tensor, device: torch.device) -> None:
    """Hold a tensor to real numbers that can be trained on, where the step takes place."""
    if not value.is_floating_point() or value.device != device:
        raise Fault(f"returned {what} as {value.dtype} on {value.device}, expected floats on {device}")


def _check(group: str, kind: str, value: object, shape: Sequence[int | None]) -> None:
    """Hold a tensor to the sizes that are known."""
    good = isinstance(value, Tensor) and value.dim() == len(shape)
    if not good or any(size not in (None, found) for size, found in zip(shape, value.shape, strict=True)):  # type: ignore[attr-defined]
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise Fault(f"returned {kind} of '{group}' {_shape(value)}, expected [{wanted}]")


def _shape(value: object) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"as {type(value).__name__}"
