"""lightly's losses of two views as losses over the global batch."""

from __future__ import annotations

import inspect
import warnings
from itertools import combinations, permutations
from typing import Literal, get_args

import lightly
import torch
from lightly import loss as lightly_loss
from lightly.loss import hypersphere_loss
from torch import Tensor, nn

from cosmos_ssl.api import Loss, LossOutput, Need, Role, Spec, StepContext
from cosmos_ssl_plugins.losses.targets import exact

LossName = Literal[
    "BarlowTwinsLoss",
    "DCLLoss",
    "DCLWLoss",
    "DirectCLRLoss",
    "HypersphereLoss",
    "MACLLoss",
    "NegativeCosineSimilarity",
    "NTXentLoss",
    "VICRegLoss",
]

NOT_OFFERED = ("gather_distributed", "memory_bank_size", "weight_fn", "dim")
"""Arguments of these classes that no config may set: the gathering is done here, queues and functions are left out."""

warnings.filterwarnings(
    "ignore", "To copy construct from a tensor", module=r"lightly\."
)  # DCLWLoss, every step; of no concern


class Lightly(Loss):
    """One of lightly's losses of two batches of features, averaged over the pairs of views of a group.

    Every view is gathered over ranks first, and all ranks compute the same loss of the global batch: statistics over
    samples (Barlow Twins' normalisation, VICReg's variance) and negatives are those of one rank with all samples.
    Classes that keep a queue or a running matrix, or take more than two batches, are not offered.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        loss: LossName,
        options: dict[str, int | float] | None = None,
        head: str | None = None,
        group: str = "global",
        target: Role = "student",
        target_head: str | None = None,
    ) -> None:
        """Raises ValueError for options that the class does not have, and for groups and heads that are not there.

        loss: the class of ``lightly.loss``.
        options: arguments of its constructor.
        head: the head whose output named as the group is compared; without one, the tower's projected image features.
        group: the view group, of at least two views.
        target: where the other side of a pair comes from; the teacher's (BYOL) gets no gradient.
        target_head: the other side's head where it is another (SimSiam: projections for predictions); no gradient.
        """
        super().__init__()
        self.group = group
        self.head, self.target, self.target_head = head, target, head if target_head is None else target_head
        self.distinct = target == "teacher" or self.target_head != head
        for option, name in (("head", head), ("target_head", target_head)):
            if name is not None and group not in spec.heads.get(name, {}):
                able = ", ".join(n for n, outputs in spec.heads.items() if group in outputs) or "none"
                raise ValueError(f"{option}: no head '{name}' with an output '{group}'. Heads that have it: {able}")
        if group in spec.image_views and spec.image_views[group].views < 2:
            raise ValueError(f"group: '{group}' has a single view, and pairs need two")
        self.loss = _make(loss, options or {})

    def requires(self) -> list[Need]:
        """Both sides, of all ranks."""
        sides: list[tuple[Role, str | None]] = [("student", self.head)]
        if self.distinct:
            sides.append((self.target, self.target_head))
        return [
            Need(role=role, modality="image", group=self.group, kind="projected", gathered=True)
            if head is None
            else Need(role=role, head=head, outputs=(self.group,), gathered=True)
            for role, head in sides
        ]

    def forward(self, ctx: StepContext) -> LossOutput:
        """The mean over pairs: each two views once, or each view with every other view of a distinct target."""
        a = self._views(ctx, "student", self.head)
        if self.distinct:
            b = self._views(ctx, self.target, self.target_head).detach()
            pairs = [(a[i], b[j]) for i, j in permutations(range(len(a)), 2)]
        else:
            pairs = [(a[i], a[j]) for i, j in combinations(range(len(a)), 2)]
        return LossOutput(terms={"pairs": torch.stack([self.loss(x, y) for x, y in pairs]).mean()})

    def _views(self, ctx: StepContext, role: Role, head: str | None) -> Tensor:
        """[V, N, W] in float32 at least."""
        features = ctx.gathered[role]
        return exact(features.stack("image", group=self.group) if head is None else features.heads[head][self.group])


def _make(name: LossName, options: dict[str, int | float]) -> nn.Module:
    """Build the class, or raise ValueError for what its constructor does not accept."""
    assert name in get_args(LossName)
    cls: type[nn.Module] | None = getattr(lightly_loss, name, None) or getattr(hypersphere_loss, name, None)
    if cls is None:
        raise ValueError(f"loss: lightly {lightly.__version__} has no {name}")
    parameters = {key: p for key, p in inspect.signature(cls).parameters.items() if key not in NOT_OFFERED}
    for key, value in options.items():
        if key not in parameters:
            accepted = ", ".join(parameters)
            if key in NOT_OFFERED:
                raise ValueError(f"options.{key}: is not offered here. {name} accepts: {accepted}")
            raise ValueError(f"options.{key}: unknown option of {name}. Accepts: {accepted}")
        if isinstance(parameters[key].default, int) and not isinstance(value, int):
            raise ValueError(f"options.{key}: expected a whole number, got {value}")
    try:
        return cls(**options)
    except ValueError as error:
        raise ValueError(f"options: {error}") from None
