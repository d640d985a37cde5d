"""Loading what fits of a state into a model, with a report of what did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

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
