"""The model of one role: towers, heads and losses, in the two phases of a step."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from cosmos_ssl.api import Features, Head, HeadOutput, Loss, LossOutput, Modality, PluginError, StepContext, Tower, Views
from cosmos_ssl.models.plan import Plan, RolePlan


class Model(nn.Module):
    """Towers, heads and losses of one role.

    Parameter names: ``image.*``, ``text.*``, ``heads.NAME.*``, ``losses.NAME.*``.
    """

    def __init__(self, towers: Mapping[Modality, Tower], heads: Mapping[str, Head], losses: Mapping[str, Loss]) -> None:
        super().__init__()
        self.image = towers.get("image")
        self.text = towers.get("text")
        self.heads = nn.ModuleDict(heads)
        self.losses = nn.ModuleDict(losses)

    @property
    def towers(self) -> dict[Modality, Tower]:
        """The towers there are."""
        pairs: tuple[tuple[Modality, Tower | None], ...] = (("image", self.image), ("text", self.text))
        return {modality: tower for modality, tower in pairs if tower is not None}

    def head(self, name: str) -> Head:
        """The head of this name."""
        return cast(Head, self.heads[name])

    def loss(self, name: str) -> Loss:
        """The loss of this name."""
        return cast(Loss, self.losses[name])

    def encode(self, views: Views, plan: RolePlan) -> Features:
        """Phase one: towers over the planned groups, then the planned heads in order."""
        image = self.image(views.image, plan.image) if self.image is not None and plan.image else {}
        text = self.text(views.text, plan.text) if self.text is not None and plan.text else {}
        heads: dict[str, HeadOutput] = {}
        features = Features(image=image, text=text, heads=heads)
        for name in plan.heads:
            heads[name] = self.heads[name](features, views)
        return features

    def compute_losses(self, context: StepContext) -> dict[str, LossOutput]:
        """Phase two: every loss once."""
        return {name: _checked(name, loss(context)) for name, loss in self.losses.items()}

    def respond(self, name: str, *args: object, **kwargs: object) -> HeadOutput:
        """Call a head on behalf of a loss."""
        return self.head(name).respond(*args, **kwargs)

    def after_step(self) -> None:
        """Run the hooks of heads and losses (clamp a scale)."""
        for part in (*self.heads.values(), *self.losses.values()):
            cast(Loss, part).after_step()

    def freeze_unread(self, plan: Plan) -> list[str]:
        """Freeze the parameters that the student's plan never reaches; return their names."""
        unread = [f"{m}.{p}" for m, tower in self.towers.items() for p in tower.unread(plan.student.of(m))]
        unread += [f"{m}.*" for m in self.towers if not plan.student.of(m)]
        unread += [f"heads.{name}.*" for name in self.heads if name not in plan.student.heads]
        frozen = [name for name, _ in self.named_parameters() if any(fnmatchcase(name, pattern) for pattern in unread)]
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)
        return frozen


def _checked(name: str, output: object) -> LossOutput:
    """Hold a loss to its contract; the words are for the plugin's author."""
    if not isinstance(output, LossOutput):
        raise PluginError(f"losses.{name} returned {type(output).__name__}, expected LossOutput(terms={{name: scalar tensor}})")
    for term, value in (*output.terms.items(), *output.metrics.items()):
        if not isinstance(value, Tensor) or value.dim() != 0:
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PluginError(f"losses.{name}: '{term}' has {shape}, expected a scalar tensor")
    if not output.terms:
        raise PluginError(f"losses.{name} returned no terms")
    return output
