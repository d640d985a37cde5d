"""The model of one role: towers, heads and losses, in the two phases of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from cosmos_ssl.api import (
    Features,
    GroupFeatures,
    Head,
    HeadOutput,
    Loss,
    LossOutput,
    Modality,
    Part,
    PluginError,
    StepContext,
    Tower,
    Views,
)
from cosmos_ssl.errors import CosmosError, is_lost_rank
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

    def parts(self) -> dict[str, str]:
        """The prefix of each part's parameters -> the part as messages call it."""
        found: dict[str, str] = {modality: describe(tower, f"model.{modality}") for modality, tower in self.towers.items()}
        found |= {f"heads.{name}": describe(self.head(name), f"heads.{name}") for name in self.heads}
        return {**found, **{f"losses.{name}": describe(self.loss(name), f"losses.{name}") for name in self.losses}}

    def head(self, name: str) -> Head:
        """The head of this name."""
        return cast(Head, self.heads[name])

    def loss(self, name: str) -> Loss:
        """The loss of this name."""
        return cast(Loss, self.losses[name])

    def encode(self, views: Views, plan: RolePlan) -> Features:
        """Phase one: towers over the planned groups, then the planned heads in order."""
        towers: dict[Modality, dict[str, GroupFeatures]] = {"image": {}, "text": {}}
        for modality, tower in self.towers.items():
            if plan.of(modality):
                with blaming(tower, f"model.{modality}"):
                    towers[modality] = tower(views.image if modality == "image" else views.text, plan.of(modality))
        heads: dict[str, HeadOutput] = {}
        features = Features(image=towers["image"], text=towers["text"], heads=heads)
        for name, outputs in plan.heads.items():
            head = self.head(name)
            with blaming(head, f"heads.{name}"):
                heads[name] = _checked_outputs(head, outputs, head(features, views, outputs))
        return features

    def compute_losses(self, context: StepContext) -> dict[str, LossOutput]:
        """Phase two: every loss once."""
        outputs = {}
        for name in self.losses:
            with blaming(self.loss(name), f"losses.{name}"):
                outputs[name] = _checked_loss(self.loss(name)(context))
        return outputs

    def respond(self, name: str, *args: object, **kwargs: object) -> HeadOutput:
        """Call a head on behalf of a loss."""
        with blaming(self.head(name), f"heads.{name}"):
            return self.head(name).respond(*args, **kwargs)

    def after_step(self) -> None:
        """Run the hooks of heads and losses (clamp a scale)."""
        for part in (*self.heads.values(), *self.losses.values()):
            cast(Loss, part).after_step()

    def freeze_unread(self, plan: Plan) -> list[str]:
        """Freeze the parameters that the student's plan never reaches; return their names."""
        unread = [f"{m}.{p}" for m, tower in self.towers.items() for p in tower.unread(plan.student.of(m))]
        unread += [f"{m}.*" for m in self.towers if not plan.student.of(m)]
        for name in self.heads:
            outputs = plan.student.heads.get(name)
            unread += [f"heads.{name}.{pattern}" for pattern in (("*",) if outputs is None else self.head(name).unread(outputs))]
        frozen = [name for name, _ in self.named_parameters() if any(fnmatchcase(name, pattern) for pattern in unread)]
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)
        return frozen


@contextmanager
def blaming(part: Part, place: str) -> Iterator[None]:
    """Say whose part failed where it is another package's; what fails in our own is our fault, and keeps its traceback."""
    try:
        yield
    except _Fault as error:
        raise PluginError(f"{describe(part, place)} {error}") from None
    except (CosmosError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not part.part_source or is_lost_rank(error):
            raise
        reason = str(error).strip().splitlines() or ["no message"]
        raise PluginError(f"{describe(part, place)} failed: {type(error).__name__}: {reason[0]}") from error


def describe(part: Part, place: str) -> str:
    """A part for a message: its place in the config, and whose it is unless ours."""
    return f"{place} ({part.part_source})" if part.part_source else place


class _Fault(Exception):
    """A breach of the contract, in words for the part's author."""


def _checked_outputs(head: Head, wanted: Sequence[str], given: object) -> HeadOutput:
    """Hold a head to its contract."""
    if not isinstance(given, Mapping):
        raise _Fault(f"returned {type(given).__name__}, expected a mapping of outputs")
    widths = head.outputs()
    for name in wanted:
        if name not in given:
            raise _Fault(f"did not return its output '{name}', but {', '.join(map(str, given)) or 'nothing'}")
        value = given[name]
        if not isinstance(value, Tensor) or value.dim() not in (2, 3) or value.shape[-1] != widths[name]:
            raise _Fault(f"returned '{name}' {_shape(value)}, expected [V, B, {widths[name]}], or [M, {widths[name]}] for masked patches")
    return given


def _checked_loss(output: object) -> LossOutput:
    """Hold a loss to its contract."""
    if not isinstance(output, LossOutput):
        raise _Fault(f"returned {type(output).__name__}, expected LossOutput(terms={{name: scalar tensor}})")
    for term, value in (*output.terms.items(), *output.metrics.items()):
        if not isinstance(term, str) or not term:
            raise _Fault(f"returned a term named {term!r}, expected a name")
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise _Fault(f"returned '{term}' {_shape(value)}, expected a scalar tensor")
    if not output.terms:
        raise _Fault("returned no terms")
    return output


def _shape(value: object) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"as {type(value).__name__}"
