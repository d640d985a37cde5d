"""Loading what fits of a state into a model, with a report of what did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cosmos_ssl.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Tensor names by what became of them; ``str`` of it is for people."""

    matched: Sequence[str]
    missing: Sequence[str]
    """Of the model, and not in the state: they keep their values."""
    unexpected: Sequence[str]
    """Of the state, and not in the model."""
    other_shapes: Sequence[str]
    """In both, with different shapes: the model's keep their values."""

    @property
    def exact(self) -> bool:
        """Whether nothing was left over on either side."""
        return not (self.missing or self.unexpected or self.other_shapes)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors loaded"]
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.other_shapes)):
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                parts.append(f"{len(names)} {word} ({shown})")
        return "; ".join(parts)


def load_partial(module: nn.Module, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Copy every tensor of ``state`` that has a namesake of its shape in ``module``.

    For loads that were asked to be partial; ``source`` is named in the error. Raises CheckpointError where
    nothing fits at all.
    """
    own = module.state_dict()
    common = [name for name in own if name in state]
    report = LoadReport(
        matched=[name for name in common if own[name].shape == state[name].shape],
        missing=[name for name in own if name not in state],
        unexpected=[name for name in state if name not in own],
        other_shapes=[name for name in common if own[name].shape != state[name].shape],
    )
    if not report.matched:
        raise CheckpointError(f"{source} has nothing in common with the model: {report}")
    module.load_state_dict({**own, **{name: state[name] for name in report.matched}})
    return report
