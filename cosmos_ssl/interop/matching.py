"""Loading what fits of a state into a model, or is made to fit, with a report of what did not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.errors import listed
from cosmos_ssl.interop.files import same_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Tensor names by what becomes of them; ``str`` of it is for people."""

    matched: Sequence[str]
    missing: Sequence[str]
    """Of the model, and not in the state: they keep their values."""
    unexpected: Sequence[str]
    """Of the state, and not in the model."""
    other_shapes: Sequence[str]
    """In both, with different shapes or types of numbers: the model's keep their values."""

    def __str__(self) -> str:
        count = len(self.matched) + len(self.unexpected) + len(self.other_shapes)
        kinds = (("of another shape", self.other_shapes), ("not in the model", self.unexpected))
        left = ", ".join(_some(names, f" {why}") for why, names in kinds if names)
        kept = f"{_some(self.missing, ' of the model')} as they were" if self.missing else ""
        return "; ".join(
            filter(None, (f"{len(self.matched):,} of {count:,} tensors", left and f"left out: {left}", kept))
        )


def _some(names: Sequence[str], what: str) -> str:
    return f"{len(names):,}{what} ({listed(names, limit=3)})"


def compare(
    module: nn.Module,
    state: Mapping[str, Tensor],
    others: Sequence[str] = (),
    own: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Return what of ``state`` has a namesake of its shape in ``module``, or in ``own``, a share of it; ``others`` are
    names beside it that have none.

    Reads no value.
    """
    own = module.state_dict() if own is None else own
    common = [name for name in own if name in state]
    fits = {name: own[name].shape == state[name].shape and same_kind(state[name], own[name]) for name in common}
    return LoadReport(
        matched=[name for name in common if fits[name]],
        missing=[name for name in own if name not in state],
        unexpected=[*(name for name in state if name not in own), *others],
        other_shapes=[name for name in common if not fits[name]],
    )


def load_matched(module: nn.Module, state: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copy what matched."""
    module.load_state_dict({**module.state_dict(), **{name: state[name] for name in report.matched}})


def adapt(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """A state with an image tower's positions resampled to the grid of a model (``own``), and with the model's own
    mask tokens where it has none; and what was done, for people.
    """
    found, notes = dict(state), []
    for name in ("image.position_embedding", "image.model.pos_embed"):
        table, like = state.get(name), own.get(name)
        if table is not None and like is not None and (fitted := _resampled(table, like)) is not None:
            found[name] = fitted
            notes.append(f"image positions resampled from {table.shape[-2]} to {like.shape[-2]} tokens")
    for tower in ("image", "text"):
        token = f"{tower}.mask_token"
        if token in own and token not in state and any(name.startswith(f"{tower}.") for name in state):
            found[token] = own[token]
            notes.append(f"{token} starts anew")
    return found, notes


def _resampled(table: Tensor, like: Tensor) -> Tensor | None:
    """Positions [.., P + N, W] of another square grid as those of ``like``, bicubic, as OpenCLIP and timm do.

    None where they are the same, or of another width or kind.
    """
    if table.dim() != like.dim() or table.shape[-1] != like.shape[-1] or table.shape[-2] == like.shape[-2]:
        return None
    old, new = (math.isqrt(x.shape[-2]) for x in (table, like))
    prefix = table.shape[-2] - old**2
    if not old or not new or prefix != like.shape[-2] - new**2:
        return None
    grid = table[..., prefix:, :].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(new**2, -1)
    first = table[..., :prefix, :].float()
    return torch.cat([first, grid.expand(*first.shape[:-2], -1, -1)], -2)
