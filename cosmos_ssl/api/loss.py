"""For authors of losses: what a loss asks for, what it is given in a step, and what it returns.

A loss in full::

    from cosmos_ssl.api import Loss, LossOutput, Need, Spec, StepContext, Strength, normalise


    class Spread(Loss):
        '''Mean squared distance of the student's image views from their sample's mean, on the unit sphere.

        ``floor``: below this distance nothing is gained.
        '''

        def __init__(self, spec: Spec, *, floor: Strength = 0.0) -> None:
            super().__init__()
            self.floor = floor

        def requires(self) -> list[Need]:
            return [Need(modality="image", kind="projected")]

        def forward(self, ctx: StepContext) -> LossOutput:
            x = normalise(ctx.student.stack("image"))  # [V, B, D], unit vectors
            distance = (x - x.mean(0)).square().sum(-1).mean()
            return LossOutput(terms={"spread": distance.clamp_min(self.floor)}, metrics={"distance": distance.detach()})

A config then says ``losses: {spread: {type: spread, loss_weight: 0.1, floor: 0.2}}``; ``loss_weight`` (default 1; a
``Curve`` moves it over the run, and the loss is not called while it is 0) is the engine's. The keyword-only arguments
are the options: typed, with a line in the docstring, bounded by types such as ``Strength``, ``Share`` or
``Temperature``; raise ValueError for what makes no sense. ``spec`` is the model around it: ``embed_dim``,
``batch_size`` (of all ranks), ``image_views["global"].views``, ``heads[NAME]`` (widths of a head's outputs),
``has_teacher``, ``epochs``. ``cosmos_ssl.api.part`` has the rest of both.

When: ``requires()`` as the model is built, and for each set of losses that rest: it says the same each time. Towers and
heads compute what some part asked for, and nothing else; what is not on offer is refused by name before training. In
each step the student, and the teacher without gradients, have run before ``forward(ctx)`` is called: once, with the
whole batch of this rank, also where that is encoded in micro-batches. ``after_step()`` follows when the optimiser has
moved.

A group with masks can be read in several forms, each of which is encoded beside the others. I-JEPA's loss compares what
a head predicts with what the teacher, which sees all, has at the masked patches; MAE's head reads the patches that were
seen, and zeros::

    Need(role="teacher", modality="image", group="global", kind="masked_tokens")  # .image["global"].masked_tokens
    Need(modality="image", group="global", kind="masked_tokens", hidden=True)  # .of("image", hidden=True)["global"]
    Need(modality="image", group="global", kind="tokens", hidden="drop")  # .of("image", hidden="drop")["global"]
    Need(modality="image", group="global", hidden=False)  # .image["global"]: whole, whoever else hides what

``Need(modality="text", kind="views")`` asks for no tower at all: a captioner's tokens are ``views.text["global"]``. One
that reads them from a tower says ``causal=True``, so that none is taken whose tokens know the next.

Shapes: B samples of this rank, V views of one group, or of all groups one after the other; W width of a tower, D shared
width, N tokens (patches of a picture, or the padded length of a text), M masked patches of a whole group. Views come
first, [V, B, ...]: view v of sample b is ``x[v, b]``. Groups are chosen by name (``global``, ``local``).

What must hold: every term is a float scalar and a mean over this rank's samples; the engine averages over ranks. What
reaches over ranks is asked for with ``Need(gathered=True)``, or done by ``cosmos_ssl.functional`` (``info_nce`` and
``sigmoid_loss`` of the global batch, ``all_sum``). Nothing that is given is changed in place. State lies in parameters
(a scale) and buffers (a running centre, moved in place; a queue that ``info_nce`` takes as further ``negatives``),
random numbers come from torch: so a step can be undone, and repeats. Buffers are the same on all ranks, which is
checked before each checkpoint; what is a rank's own is registered with ``persistent=False``.
``cosmos_ssl.testing.check_loss`` tries all this, on several ranks too (``ranks=2``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api.part import ParameterRule, Part, Progress
from cosmos_ssl.api.views import ALL, HeadOutput, Hidden, Kind, Modality, Role, Views, check_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One thing that a head or a loss reads. The union of all needs is the plan of a step.

    Either features (``modality``, ``group``, ``views``, ``kind``) or a head's output (``head``).
    A head runs on whichever role its readers ask for; ``role`` in a head's own needs is ignored.
    """

    role: Role = "student"
    """``student`` or ``teacher``."""
    modality: Modality | None = None
    """``image`` or ``text``."""
    group: str = ALL
    """A view group, or ``*``: every one that the augmenter offers."""
    views: tuple[int, ...] | None = None
    """Which of the group's views; None is all of them."""
    kind: Kind = "projected"
    """``pooled``, ``projected``, ``tokens`` or ``masked_tokens``, as in ``GroupFeatures``; or ``views``: nothing of a
    tower, which there need not be, but the group itself (pixels, token ids), in ``views``.
    """
    hidden: Hidden | None = None
    """How the student reads a group with masks; teachers see all.

    False: whole. True: masked patches, or tokens of texts, hidden behind the mask token. ``drop``: left out, so that
    only the others are computed. True and ``drop`` are read by ``Features.of(modality, hidden=...)``, and change
    nothing for others. None (whoever does not say): True where some ``masked_tokens`` of the group are read by one who
    does not say either, else False.
    """
    causal: bool = False
    """Tokens that must know nothing of those after them, as whoever predicts the next one needs them."""
    pads: bool = False
    """Tokens of texts: also those after the end of the text (otherwise zeros stand there)."""
    head: str | None = None
    """A head of the config."""
    outputs: tuple[str, ...] | None = None
    """Which of the head's outputs; None is all of them."""
    gathered: bool = False
    """Also wanted from all ranks, as ``StepContext.gathered[role]`` with the global batch in B's place; not for tokens
    and masked patches.
    """

    def __post_init__(self) -> None:
        if (self.head is None) == (self.modality is None):
            raise ValueError("a Need names either a modality or a head")
        if self.outputs is not None and self.head is None:
            raise ValueError("a Need names outputs of a head only")
        if self.hidden not in (None, True, False, "drop"):
            raise ValueError(f"a Need is hidden=True, False or 'drop', not {self.hidden!r}")
        if self.kind == "masked_tokens" and self.hidden == "drop":
            raise ValueError("a Need of masked_tokens cannot have them left out: hidden is 'drop'")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFeatures:
    """What a tower computed for one view group; what nobody asked for is None."""

    views: tuple[int, ...]
    """The views of the group that were encoded, in the order of the leading dimension."""
    pooled: Tensor | None = None
    """[V, B, W], before the projection; towers always give it."""
    projected: Tensor | None = None
    """[V, B, D], not normalised."""
    tokens: Tensor | None = None
    """[views asked for, B, N, W], after the final norm; image: patches alone."""
    token_views: tuple[int, ...] = ()
    """The views that ``tokens`` holds, in its order."""
    masked_tokens: Tensor | None = None
    """[M, W], the tokens at masked positions, in the order of ``masks[V, B, N]`` as a boolean index."""

    def __post_init__(self) -> None:
        if self.pooled is not None:
            check_shape("pooled", self.pooled, "V B W", V=len(self.views))
        if self.projected is not None:
            check_shape("projected", self.projected, "V B D", V=len(self.views))
        if self.tokens is not None:
            check_shape("tokens", self.tokens, "V B N W", V=len(self.token_views))

    @property
    def unit(self) -> Tensor:
        """``normalise`` of ``projected``: [V, B, D]."""
        assert self.projected is not None, "projected was not asked for: name it in requires()"
        return normalise(self.projected)

    def tokens_of(self, views: Sequence[int]) -> Tensor:
        """The tokens of these views: [len(views), B, N, W]."""
        assert self.tokens is not None, "tokens were not asked for: name them in requires()"
        if tuple(views) == self.token_views:
            return self.tokens
        return self.tokens[[self.token_views.index(view) for view in views]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What one role computed for a batch: features by modality and group, head outputs by head."""

    image: Mapping[str, GroupFeatures] = field(default_factory=dict)
    text: Mapping[str, GroupFeatures] = field(default_factory=dict)
    heads: Mapping[str, HeadOutput] = field(default_factory=dict)
    """By head and output: [V, B, width], [V, B, N, width] of tokens, or [M, width] of masked patches."""
    forms: Mapping[tuple[Modality, Hidden], Mapping[str, GroupFeatures]] = field(default_factory=dict)
    """Groups that are read in another form than those above: what ``of`` finds by ``hidden``."""

    def of(self, modality: Modality, *, hidden: Hidden | None = None) -> Mapping[str, GroupFeatures]:
        """The groups of one modality; ``hidden`` as the ``Need`` had it. A teacher's are whole, whatever is asked."""
        groups = self.image if modality == "image" else self.text
        return groups if hidden is None else {**groups, **self.forms.get((modality, hidden), {})}

    def stack(self, modality: Modality, kind: Literal["pooled", "projected"] = "projected", group: str = ALL) -> Tensor:
        """One group's features, or those of all groups one after the other: [V, B, W or D], not normalised."""
        groups = self.of(modality)
        chosen = list(groups.values()) if group == ALL else [groups[group]]
        tensors = [getattr(features, kind) for features in chosen]
        assert all(tensor is not None for tensor in tensors), f"{kind} was not asked for: name it in requires()"
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def normalise(x: Tensor) -> Tensor:
    """Unit vectors: scale the last dimension to length one, in float32 at least (half precision loses small angles)."""
    x = x if x.dtype == torch.float64 else x.float()
    return cast(Tensor, _Unit.apply(x)[0]) if x.is_cuda else F.normalize(x, dim=-1)  # type: ignore[no-untyped-call]


class _Unit(torch.autograd.Function):
    """``F.normalize`` of the last dimension, and the lengths; the gradient by four kernels in place of fourteen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit, length

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_length: Tensor | None) -> Tensor | None:
        unit, length = ctx.saved_tensors
        found: Tensor | None = None
        if grad is not None:
            found = torch.addcmul(grad, unit, (unit * grad).sum(-1, keepdim=True), value=-1) / length
        if of_length is not None:  # where a gradient is differentiated
            found = unit * of_length if found is None else found + unit * of_length
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """All that a loss may read in one step."""

    views: Views
    """The batch: ``image[GROUP].pixels`` (floats [V, B, 3, H, W]) and ``masks`` (bool [V, B, N], on the host),
    ``text[GROUP].tokens`` and ``lengths`` (on the host); ``keys`` and ``extras`` of its samples.
    """
    student: Features
    teacher: Features | None
    """None where no part asked for the teacher."""
    gathered: Mapping[Role, Features]
    """Features asked for with ``gathered=True``: [V, ranks x B, ...] in rank order, gradients included."""
    progress: Progress
    """``step`` from 0, ``epoch`` with fractions, ``fraction`` of the run that is done."""
    head: Callable[..., HeadOutput]
    """``head(name, *args, **kwargs)`` calls a head's ``respond`` method (heads conditioned on other samples)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What a loss returns: ``terms`` are summed and trained on, ``metrics`` are only logged.

    Every value is a scalar tensor and a mean over this rank's samples.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(Part, nn.Module, ABC):
    """Scalar terms of a step's features. Runs exactly once an optimiser step; owns its scales and biases."""

    calls_heads: ClassVar[bool] = False
    """True where ``forward`` uses ``ctx.head``: bars exact accumulation."""

    @abstractmethod
    def requires(self) -> Sequence[Need]:
        """Return what ``forward`` reads."""

    @abstractmethod
    def forward(self, ctx: StepContext) -> LossOutput:
        """The terms, each a scalar and a mean over this rank's samples."""

    def after_step(self) -> None:
        """Called once after every optimiser step (clamp a scale here)."""

    def parameter_rules(self) -> Sequence[ParameterRule]:
        """Learning rates, decay and freezing of its parameters, where they are not the run's own."""
        return ()
