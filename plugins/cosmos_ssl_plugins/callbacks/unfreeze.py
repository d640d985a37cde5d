"""Parameters that are trained from some epoch on."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from cosmos_ssl.api import Callback, ParameterRule, Spec, Strength, Whole


class Unfreeze(Callback):
    """Some parameters get no update, nor moments of one, before an epoch or a step; all ranks and resumes agree.

    ``match``: fnmatch pattern over full names, such as 'image.*'.
    ``epoch``: from which epoch on, with fractions.
    ``step``: from which step on, instead.

    Raises ValueError unless one of the two is given.
    """

    def __init__(self, spec: Spec, *, match: str, epoch: Strength | None = None, step: Whole | None = None) -> None:
        if (epoch is None) == (step is None):
            raise ValueError("give either epoch or step")
        self.match, self.epoch, self.step = match, epoch, step
        self.steps_per_epoch = spec.steps_per_epoch

    def prepare(self, model: nn.Module) -> None:
        """Raise ValueError where the pattern is no parameter's."""
        if not any(fnmatchcase(name, self.match) for name, _ in model.named_parameters()):
            raise ValueError(f"match: '{self.match}' matches no parameter")

    def parameter_rules(self) -> Sequence[ParameterRule]:
        """One, to be frozen until then."""
        epoch = self.epoch if self.step is None else self.step / max(1, self.steps_per_epoch)
        return [ParameterRule(match=self.match, frozen_epochs=epoch)]
