"""COSMOS's cross-modality self-distillation: the student's cross features against the teacher's features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Loss, LossOutput, Modality, Need, Spec, StepContext, normalise
from cosmos_ssl.functional import info_nce

MAX_LOG_SCALE = math.log(100)
MODALITIES: tuple[Modality, ...] = ("image", "text")


class CrossModalityDistillation(Loss):
    """Mean of four InfoNCE: image and text cross features against the teacher's image and text features.

    COSMOS, arXiv 2412.01814, section 3. The teacher sees global views alone and gets no gradient.
    """

    def __init__(self, spec: Spec, *, head: str | None = None, init_logit_scale: float = 1 / 0.07) -> None:
        """Raises ValueError for a head without the two outputs, and for a scale out of range.

        head: the head whose outputs ``image`` and ``text`` are the cross features. Without one, the student's own
            features of all views stand in their place (the ablation without cross-attention).
        init_logit_scale: inverse temperature at the start; it is learned, and kept within 1..100.
        """
        super().__init__()
        if head is not None and not {"image", "text"} <= spec.heads.get(head, {}).keys():
            able = ", ".join(n for n, o in spec.heads.items() if {"image", "text"} <= o.keys()) or "none"
            raise ValueError(f"head: no head '{head}' with outputs 'image' and 'text'. Heads that have them: {able}")
        if not 1 <= init_logit_scale <= 100:
            raise ValueError(f"init_logit_scale: {init_logit_scale:g} is outside 1..100")
        self.head = head
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))

    def notice(self) -> str:
        """Without a head it is not the method but an ablation of it."""
        return (
            ""
            if self.head is not None
            else (
                "no head is given, so this is the ablation without a cross-attention head: the student's own features "
                "stand in place of the cross features. For the method, name the head: head"
            )
        )

    def requires(self) -> list[Need]:
        """The head on the student, or its features of all views; the teacher's global features of all ranks."""
        own = [Need(modality="image", hidden=False), Need(modality="text", hidden=False)]
        return [
            *(own if self.head is None else [Need(head=self.head, outputs=("image", "text"))]),
            Need(role="teacher", modality="image", group="global", kind="projected", gathered=True),
            Need(role="teacher", modality="text", group="global", kind="projected", gathered=True),
        ]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term; the scale and the entropy of the teacher's matches as metrics."""
        teacher = ctx.gathered["teacher"]
        students = [normalise(self._student(ctx, m)) for m in MODALITIES]
        teachers = [normalise(teacher.stack(m, group="global")) for m in MODALITIES]
        scale = self.logit_scale.exp()
        # one call for the mean of four means: a view weighs half of its side's share
        loss = info_nce(
            torch.cat(students), torch.cat(teachers), scale, a_weights=_halves(students), b_weights=_halves(teachers)
        )
        entropy = _entropy(teachers[0][0], teachers[1][0], scale)
        return LossOutput(terms={"distillation": loss}, metrics={"logit_scale": scale, "teacher_entropy": entropy})

    def _student(self, ctx: StepContext, modality: Modality) -> Tensor:
        """[V, B, D] of all views of a modality."""
        return ctx.student.stack(modality) if self.head is None else ctx.student.heads[self.head][modality]

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the log-scale within 0..ln 100."""
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)


def _halves(sides: list[Tensor]) -> list[float]:
    return [0.5 / side.shape[0] for side in sides for _ in range(side.shape[0])]


@torch.no_grad()
def _entropy(images: Tensor, texts: Tensor, scale: Tensor, rows: int = 64) -> Tensor:
    """Mean entropy, in nats, of the teacher's softmax over texts for some images: 0 is a sure match."""
    log_p = (scale * images[:rows] @ texts.T).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()
