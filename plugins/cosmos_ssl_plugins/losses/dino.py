"""DINO's self-distillation: the student's views against the teacher's global views.

Shape letters: T the teacher's views, S the student's, B samples, K prototypes.
"""

from __future__ import annotations

import torch

from cosmos_ssl.api import Curve, Few, Loss, LossOutput, Need, Share, Spec, StepContext, Strength, Temperature
from cosmos_ssl_plugins.losses.targets import Centering, TeacherTargets, entropy, exact


class Dino(Loss):
    """Cross-entropy of every student view to every other global view of the teacher (DINO, arXiv 2104.14294, section
    3.1).

    The mean over pairs of two different views. The teacher's logits are centred by their running mean or, as in DINOv2
    (arXiv 2304.07193, section 4), by Sinkhorn-Knopp; both over the samples of all ranks.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        head: str,
        group: str = "global",
        student_groups: list[str] | None = None,
        centering: Centering = "center",
        warmup_teacher_temp: Temperature = 0.04,
        teacher_temp: Temperature | Curve[Temperature] = 0.04,
        warmup_teacher_temp_epochs: Strength = 0,
        student_temp: Temperature = 0.1,
        center_momentum: Share = 0.9,
        sinkhorn_iterations: Few = 3,
    ) -> None:
        """Raises ValueError for a head without the groups' outputs, fewer than two views, and a fixed centre.

        head: the head that gives logits of each view group, such as a ``dino_projection``.
        group: the view group that the teacher sees.
        student_groups: those that the student is compared in; null: this one and all others of the head.
        centering: ``center`` (running mean) or ``sinkhorn``.
        warmup_teacher_temp: the teacher's temperature at the start.
        teacher_temp: the teacher's temperature after its warm-up; a curve leaves the warm-up out.
        warmup_teacher_temp_epochs: epochs in which it changes, linearly.
        student_temp: the student's temperature.
        center_momentum: how much of the running mean stays at each step.
        sinkhorn_iterations: rounds of Sinkhorn-Knopp.
        """
        super().__init__()
        able = [name for name, outputs in spec.heads.items() if group in outputs]
        if head not in able:
            raise ValueError(
                f"head: no head '{head}' with an output '{group}'. Heads that have it: {', '.join(able) or 'none'}"
            )
        there = [name for name in spec.image_views if name in spec.heads[head]]
        strange = [name for name in student_groups or () if name not in there]
        if strange or student_groups == []:
            given = f"no view group '{strange[0]}' of the head '{head}'" if strange else "an empty list"
            raise ValueError(f"student_groups: {given}. There are: {', '.join(there)}")
        self.groups = tuple(sorted(student_groups or there, key=lambda name: name != group))  # the teacher's come first
        if sum(spec.image_views[name].views for name in {group, *self.groups}) < 2:
            raise ValueError("needs two views of a picture: give augmenters.image a second global view, or local ones")
        self.head, self.group = head, group
        self.student_temp = student_temp
        self.targets = TeacherTargets(
            spec.heads[head][group],
            centering=centering,
            warmup_teacher_temp=warmup_teacher_temp,
            teacher_temp=teacher_temp,
            warmup_teacher_temp_epochs=warmup_teacher_temp_epochs,
            center_momentum=center_momentum,
            sinkhorn_iterations=sinkhorn_iterations,
        )

    def requires(self) -> list[Need]:
        """The head on views of the student and on the teacher's global ones."""
        return [Need(head=self.head, outputs=self.groups), Need(role="teacher", head=self.head, outputs=(self.group,))]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term; entropy and temperature of the teacher as metrics."""
        assert ctx.teacher is not None
        shown = ctx.teacher.heads[self.head][self.group]  # [T, B, K]
        targets = self.targets(shown.flatten(0, 1), ctx.progress).view(shown.shape)
        logits = torch.cat([ctx.student.heads[self.head][name] for name in self.groups])
        log_p = (exact(logits) / self.student_temp).log_softmax(-1)  # [S, B, K]
        pairs = -torch.einsum("tbk,sbk->ts", targets, log_p) / shown.shape[1]
        shared = len(pairs) if self.group in self.groups else 0  # the same view is left out
        others = 1 - torch.eye(*pairs.shape, device=pairs.device, dtype=pairs.dtype) * bool(shared)
        metrics = {
            "teacher_entropy": entropy(targets.flatten(0, 1)),
            "teacher_temp": pairs.new_full((), self.targets.temperature(ctx.progress)),
        }
        return LossOutput(terms={"distillation": (pairs * others).sum() / (pairs.numel() - shared)}, metrics=metrics)
