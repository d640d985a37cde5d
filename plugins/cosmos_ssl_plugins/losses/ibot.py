"""iBOT's masked image modelling: the student's hidden patches against what the teacher sees there.

Shape letters: V views, B samples, N patches of a view, M masked patches of the group, K prototypes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cosmos_ssl.api import Curve, Few, Loss, LossOutput, Need, Role, Share, Spec, StepContext, Strength, Temperature
from cosmos_ssl.functional import upload
from cosmos_ssl_plugins.heads.per_group import MASKED, PATCHES
from cosmos_ssl_plugins.losses.targets import Centering, TeacherTargets, entropy, exact


class Ibot(Loss):
    """Cross-entropy at the masked patches of global views, teacher unmasked (iBOT, arXiv 2111.07832, section 3.1).

    The mean over the masked patches of a view, then over all views; a view without masked patches counts 0, as in
    DINOv2. Centring as in the loss ``dino``, over patches of all ranks.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        head: str,
        group: str = "global",
        centering: Centering = "center",
        warmup_teacher_temp: Temperature = 0.04,
        teacher_temp: Temperature | Curve[Temperature] = 0.07,
        warmup_teacher_temp_epochs: Strength = 30,
        student_temp: Temperature = 0.1,
        center_momentum: Share = 0.9,
        sinkhorn_iterations: Few = 3,
        center_over: Literal["masked", "all"] = "masked",
    ) -> None:
        """Raises ValueError for a head without the outputs that are read, and a centre that never moves.

        head: the head that gives logits of masked patches, such as a ``dino_projection``.
        group: the view group whose masked patches are read.
        centering: ``center`` (running mean) or ``sinkhorn``.
        warmup_teacher_temp: the teacher's temperature at the start.
        teacher_temp: the teacher's temperature after its warm-up; a curve leaves the warm-up out.
        warmup_teacher_temp_epochs: epochs in which it changes, linearly.
        student_temp: the student's temperature.
        center_momentum: how much of the running mean stays at each step.
        sinkhorn_iterations: rounds of Sinkhorn-Knopp.
        center_over: the running mean is of the ``masked`` patches' logits, or of ``all`` patches' of the group, as in
            the authors' program (main_ibot.py). The teacher's head then runs on all patches.
        """
        super().__init__()
        if center_over == "all" and centering != "center":
            raise ValueError(f"center_over: all needs centering: center, not {centering}")
        output = group + MASKED
        able = [name for name, outputs in spec.heads.items() if output in outputs]
        if head not in able:
            hint = (
                ""
                if any(view.masks for view in spec.image_views.values())
                else ". No masks are drawn: set augmenters.image.mask_probability"
            )
            raise ValueError(
                f"head: no head '{head}' with an output '{output}'. Heads that have it: "
                f"{', '.join(able) or 'none'}{hint}"
            )
        self.shown = group + PATCHES if center_over == "all" else output
        if self.shown not in spec.heads[head]:
            raise ValueError(f"center_over: all needs an output '{self.shown}' of the head '{head}'")
        self.head, self.group, self.output = head, group, output
        self.student_temp = student_temp
        self.targets = TeacherTargets(
            spec.heads[head][output],
            centering=centering,
            warmup_teacher_temp=warmup_teacher_temp,
            teacher_temp=teacher_temp,
            warmup_teacher_temp_epochs=warmup_teacher_temp_epochs,
            center_momentum=center_momentum,
            sinkhorn_iterations=sinkhorn_iterations,
        )

    def requires(self) -> list[Need]:
        """The head at masked patches, on student (which does not see them) and teacher (which does, or at all)."""
        outputs: dict[Role, str] = {"student": self.output, "teacher": self.shown}
        return [Need(head=self.head, outputs=(output,), role=role) for role, output in outputs.items()]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term; entropy and temperature of the teacher and the share of masked patches as metrics."""
        masks = ctx.views.image[self.group].masks  # [V, B, N]
        assert ctx.teacher is not None and masks is not None
        logits, everywhere = ctx.teacher.heads[self.head][self.shown], None  # [M, K]
        if self.shown != self.output:
            everywhere = logits.flatten(0, -2)  # [V B N, K]
            logits = everywhere[upload(logits.device, masks.flatten().nonzero()[:, 0])[0]]
        targets = self.targets(logits, ctx.progress, everywhere)
        log_p = (exact(ctx.student.heads[self.head][self.output]) / self.student_temp).log_softmax(-1)
        loss, masked = masked_mean(-torch.linalg.vecdot(targets, log_p), masks)
        metrics = {
            "teacher_entropy": entropy(targets),
            "teacher_temp": log_p.new_full((), self.targets.temperature(ctx.progress)),
            "masked": masked,
        }
        return LossOutput(terms={"patches": loss}, metrics=metrics)


def masked_mean(values: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of values at masked patches [M] over those of a view, then over all views; and the share of masked
    patches. ``masks`` is bool [V, B, N], on the host; a view without masked patches counts 0.
    """
    counts = masks.sum(-1).flatten()
    shares = (1 / counts.clamp_min(1).to(values.dtype)).repeat_interleave(counts)
    weights, masked = upload(values.device, shares, masks.to(values.dtype).mean())
    return (weights * values).sum() / len(counts), masked
