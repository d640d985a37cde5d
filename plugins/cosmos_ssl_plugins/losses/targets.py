"""A teacher's logits as targets: their temperature, and the centring that keeps them from collapsing.

Shape letters: n rows of this rank (they may differ in number from rank to rank), K prototypes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Curve, Progress
from cosmos_ssl.functional import all_max, all_sum

Centering = Literal["center", "sinkhorn"]
Scope = Literal["all_ranks", "rank"]
"""Whose samples a statistic of the batch is taken over: those of all ranks, or of each rank by itself."""
ROWS_AT_ONCE = 256
"""Rows whose entropy is computed at once, to hold little memory."""


class TeacherTargets(nn.Module):
    """Teacher logits [n, K] to distributions over prototypes, centred over the rows of all ranks.

    ``center``: softmax((x - c) / t), and then c <- m c + (1 - m) mean x (DINO, arXiv 2104.14294, section 3.1); c is a
    buffer that a batch without rows, or with values that are not finite, leaves as it is. ``sinkhorn``: as the function
    below. The temperature t rises linearly over the first epochs, or by a curve of its own.
    """

    center: Tensor | None

    def __init__(
        self,
        width: int,
        *,
        centering: Centering,
        warmup_teacher_temp: float,
        teacher_temp: float | Curve[float],
        warmup_teacher_temp_epochs: float,
        center_momentum: float,
        sinkhorn_iterations: int,
    ) -> None:
        """The arguments are options of losses. Raises ValueError for a centre that never moves."""
        super().__init__()
        if center_momentum == 1:
            raise ValueError("center_momentum: 1 never moves the centre")
        self.start_temp, self.end_temp, self.warmup = warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs
        self.momentum = center_momentum
        self.iterations = sinkhorn_iterations
        self.register_buffer("center", torch.zeros(width) if centering == "center" else None)

    def temperature(self, progress: Progress) -> float:
        """The temperature at this step."""
        if isinstance(self.end_temp, Curve):
            return self.end_temp.at(progress)
        done = min(1.0, progress.epoch / self.warmup) if self.warmup else 1.0
        return self.start_temp + (self.end_temp - self.start_temp) * done

    @torch.no_grad()
    def forward(self, logits: Tensor, progress: Progress, center_rows: Tensor | None = None) -> Tensor:
        """Return distributions [n, K], float32 at least, and move the center.

        Args:
            logits: [n, K], of the teacher.
            progress: the step, for the temperature.
            center_rows: [m, K], whose mean moves the center; ``logits`` if None.
        """
        x = exact(logits)
        if self.center is None:
            return sinkhorn(x / self.temperature(progress), self.iterations)
        targets = ((x - self.center) / self.temperature(progress)).softmax(-1)
        rows = x if center_rows is None else center_rows
        total = all_sum(torch.cat([rows.sum(0, dtype=x.dtype), x.new_full((1,), len(rows))]))
        mean, count = (total[:-1] / total[-1]).to(self.center.dtype), total[-1]
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        self.center.copy_(torch.where((count > 0) & mean.isfinite().all(), moved, self.center))
        return targets


@torch.no_grad()
def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Distributions [n, K] from scores [n, K]: prototypes get equal shares of the rows of all ranks, rows sum to one.

    Sinkhorn-Knopp on exp(scores), so many rounds (SwAV, arXiv 2006.09882, section 3.1; as in DINOv2). The matrix is
    kept as diag(a) E diag(b) with the largest entry of each row of E at 1, so a round is two products of E and a
    vector, and nothing overflows.
    """
    least = (
        scores.shape[1] * torch.finfo(scores.dtype).tiny
    )  # of a prototype's mass: below it, products with E would overflow
    peaks = scores.amax(1) if len(scores) else scores.new_empty(0)
    highest = all_max(peaks.amax() if len(scores) else scores.new_full((), -torch.inf))
    matrix = (scores - peaks[:, None]).exp_()
    a = (peaks - highest).exp_()
    b = scores.new_ones(scores.shape[1])
    for _ in range(iterations):
        b = all_sum(a @ matrix).clamp_min(least).reciprocal()
        a = (matrix @ b).reciprocal()
    shares: Tensor = matrix.mul_(b).mul_(a[:, None])
    return shares


def exact(x: Tensor) -> Tensor:
    """The same values in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def entropy(targets: Tensor) -> Tensor:
    """Mean entropy of distributions [n, K] over the rows of all ranks, in nats: 0 is one sure prototype, ln K all
    alike; 0 without rows.
    """
    total = torch.stack([torch.special.entr(rows).sum() for rows in targets.split(ROWS_AT_ONCE)]).sum()
    total, rows = all_sum(torch.stack([total, total.new_full((), len(targets))]))
    mean: Tensor = total / rows.clamp_min(1)
    return mean
