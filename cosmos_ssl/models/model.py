"""The model of one role: towers and heads, of the student losses too, in the two phases of a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from cosmos_ssl.api import (
    Features,
    GroupFeatures,
    Head,
    HeadOutput,
    Hidden,
    Loss,
    LossOutput,
    Modality,
    Part,
    Progress,
    StepContext,
    Tower,
    Views,
)
from cosmos_ssl.api.part import describe
from cosmos_ssl.models.contract import (
    blaming,
    checked_features,
    checked_loss,
    checked_outputs,
    is_built_in,
    untouched,
)
from cosmos_ssl.models.missing import saying_needs
from cosmos_ssl.models.plan import Plan, RolePlan


def buffers_of(model: nn.Module) -> Callable[[], list[Tensor]]:
    """Return what lists the buffers of ``model`` without walking its modules again; a part may have put another tensor
    into the place of one.
    """
    held = [module._buffers for module in model.modules() if module._buffers]
    return lambda: [buffer for buffers in held for buffer in buffers.values() if buffer is not None]


class Named(nn.ModuleDict):
    """Parts by name, with tensors named ``NAME.*``.

    Any name will do, also those of a module's own attributes, such as ``forward``.
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Called for every new part."""
        self._modules[name] = module  # type: ignore[assignment]

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # nn.Module's would take the flag ``training`` for the part of this name


class Model(nn.Module):
    """Towers and heads of one role; losses are the student's alone.

    Parameter names: ``image.*``, ``text.*``, ``heads.NAME.*``, ``losses.NAME.*``.
    """

    def __init__(
        self,
        towers: Mapping[Modality, Tower],
        heads: Mapping[str, Head],
        losses: Mapping[str, Loss],
        embed_dim: int | None = None,
    ) -> None:
        """``embed_dim``: the shared width, which towers are held to where it is known."""
        super().__init__()
        self.embed_dim = embed_dim
        self.strict = False
        """Whether parts are watched for what they change in place, too, which takes time."""
        self.image = towers.get("image")
        self.text = towers.get("text")
        self.heads = Named(heads)
        self.losses = Named(losses)

    def with_losses(self, losses: Mapping[str, Loss]) -> Model:
        """The same towers and heads, shared, with these losses: with none it is what a teacher follows."""
        model = Model(self.towers, cast(Mapping[str, Head], self.heads), losses, self.embed_dim)
        model.training = self.training
        return model

    @property
    def towers(self) -> dict[Modality, Tower]:
        """The towers there are."""
        towers: dict[Modality, Tower | None] = {"image": self.image, "text": self.text}
        return {modality: tower for modality, tower in towers.items() if tower is not None}

    def parts(self) -> dict[str, str]:
        """The prefix of each part's parameters -> the part as messages call it."""
        found: dict[str, str] = {
            modality: describe(tower, f"model.{modality}") for modality, tower in self.towers.items()
        }
        found |= {f"heads.{name}": describe(self.head(name), f"heads.{name}") for name in self.heads}
        return {**found, **{f"losses.{name}": describe(self.loss(name), f"losses.{name}") for name in self.losses}}

    @property
    def contrastive(self) -> str | None:
        """The loss that learned by what pictures and texts are compared: the first of the built-in ``clip`` and
        ``siglip``.
        """
        kinds = ("clip", "siglip")
        return next(
            (name for name, loss in self.losses.items() if any(is_built_in(loss, "losses", kind) for kind in kinds)),
            None,
        )

    def head(self, name: str) -> Head:
        """The head of this name."""
        return cast(Head, self.heads[name])

    def loss(self, name: str) -> Loss:
        """The loss of this name."""
        return cast(Loss, self.losses[name])

    def encode(self, views: Views, plan: RolePlan) -> Features:
        """Phase one: towers over the planned groups, then the planned heads in order."""
        features = self._encode_groups("image", views, plan, Features())
        features = self._encode_groups("text", views, plan, features)
        for name, outputs in plan.heads.items():
            head, shown = self.head(name), plan.shown(f"heads.{name}", features)
            with blaming(head, f"heads.{name}"), self._watched(features, views):
                given = (shown, views, outputs)
                made = saying_needs(head, *given) if self.strict else head(*given)
                found = checked_outputs(head, outputs, len(views), views.device, made)
            features = replace(features, heads={**features.heads, name: found})
        return features

    def _encode_groups(self, modality: Modality, views: Views, plan: RolePlan, features: Features) -> Features:
        """``features``, and what the tower of this modality makes of the planned groups, each in its forms."""
        wanted = plan.of(modality)
        if not wanted:
            return features
        tower, groups = self.towers[modality], views.of(modality)
        given = {entry: groups[plan.form(modality, entry)[0]] for entry in wanted}
        with blaming(tower, f"model.{modality}"), self._watched(given):
            made = checked_features(tower, wanted, len(views), self.embed_dim, views.device, tower(given, wanted))
        shown: dict[str, GroupFeatures] = {}
        forms: dict[tuple[Modality, Hidden], dict[str, GroupFeatures]] = {}
        for entry in wanted:
            group, hidden = plan.form(modality, entry)
            plain = hidden == ((modality, group) in plan.veiled)
            (shown if plain else forms.setdefault((modality, hidden), {}))[group] = made[entry]
        features = replace(features, forms={**features.forms, **forms})
        return replace(features, image=shown) if modality == "image" else replace(features, text=shown)

    def compute_losses(
        self, context: StepContext, plan: RolePlan, resting: Collection[str] = ()
    ) -> dict[str, LossOutput]:
        """Phase two: every loss once, but for those that rest; ``plan`` is the student's."""
        outputs = {}
        for name in [name for name in self.losses if name not in resting]:
            given = (context.views, context.student, context.teacher, context.gathered)
            place = f"losses.{name}"
            gathered = {**context.gathered, "student": plan.shown(place, context.gathered["student"])}
            shown = replace(context, student=plan.shown(place, context.student), gathered=gathered)
            with blaming(self.loss(name), place), self._watched(*given):
                found = saying_needs(self.loss(name), shown) if self.strict else self.loss(name)(shown)
                outputs[name] = checked_loss(found, context.views.device)
        return outputs

    def _watched(self, *given: object) -> AbstractContextManager[None]:
        return untouched(*given) if self.strict else nullcontext()

    def respond(self, name: str, *args: object, **kwargs: object) -> HeadOutput:
        """Call a head on behalf of a loss."""
        with blaming(self.head(name), f"heads.{name}"):
            return self.head(name).respond(*args, **kwargs)

    def set_progress(self, progress: Progress) -> None:
        """Tell towers and heads where the run is."""
        parts: dict[str, Part] = {f"model.{modality}": tower for modality, tower in self.towers.items()}
        for place, part in (parts | {f"heads.{name}": self.head(name) for name in self.heads}).items():
            with blaming(part, place):
                part.set_progress(progress)

    def after_step(self) -> None:
        """Run the hooks of heads and losses (clamp a scale)."""
        for group, parts in (("heads", self.heads), ("losses", self.losses)):
            for name, part in parts.items():
                with blaming(cast(Loss, part), f"{group}.{name}"):
                    cast(Loss, part).after_step()

    def freeze_unread(self, plan: Plan) -> list[str]:
        """Freeze the parameters that the student's plan never reaches; return their names."""
        unread = [f"{m}.*" for m in self.towers if not plan.student.of(m)]
        for modality, tower in self.towers.items():
            with blaming(tower, f"model.{modality}"):
                unread += [f"{modality}.{pattern}" for pattern in tower.unread(plan.student.of(modality))]
        for name in self.heads:
            outputs = plan.student.heads.get(name)
            with blaming(self.head(name), f"heads.{name}"):
                unread += [
                    f"heads.{name}.{pattern}"
                    for pattern in (("*",) if outputs is None else self.head(name).unread(outputs))
                ]
        frozen = {
            name: p for name, p in self.named_parameters() if any(fnmatchcase(name, pattern) for pattern in unread)
        }
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        return list(frozen)
