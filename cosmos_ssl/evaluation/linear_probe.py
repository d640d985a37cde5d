"""Linear classification of frozen features: multinomial logistic regression by L-BFGS, its penalty chosen on held-out
samples.

Shape letters: N samples, W width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import DataError
from cosmos_ssl.functional import gather_objects, rank, world_size

PENALTIES = tuple(10.0 ** (-n / 2) for n in range(13))
"""1 to 1e-6, two a decade."""
_ROWS = 1 << 26  # logits held at once
_HELD_OUT = 0.2


class Probe(NamedTuple):
    """A linear classifier of features as they come from the tower."""

    weight: Tensor
    """[C, W]"""
    bias: Tensor
    """[C]"""

    def scores(self, features: Tensor) -> Tensor:
        """Logits [n, C] of features [n, W]."""
        return features @ self.weight.T + self.bias


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    penalty: float,
    steps: int = 1000,
    tolerance: float = 1e-6,
    start: Probe | None = None,
) -> Probe:
    """Minimise mean cross-entropy + penalty / 2 |weight|^2 over features [N, W] and labels int64 [N]; the bias is free.

    (scikit-learn's LogisticRegression with C = 1 / (N penalty).) It is convex: L-BFGS with strong Wolfe steps
    goes on from ``start`` (default: zeros) until no gradient exceeds ``tolerance``, at most ``steps`` times.
    """
    count, width = features.shape
    weight = features.new_zeros(classes, width + 1)  # the bias is the last column
    if start is not None:
        weight.copy_(torch.cat([start.weight, start.bias[:, None]], 1))
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=steps,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, _ROWS // classes)

    def closure() -> Tensor:
        value = weight.new_zeros(())
        grad = torch.zeros_like(weight)
        for start in range(0, count, rows):
            x, y = features[start : start + rows], labels[start : start + rows]
            logs = F.log_softmax(torch.addmm(weight[:, -1], x, weight[:, :-1].T), 1)
            value -= logs.gather(1, y[:, None]).sum()
            error = logs.exp_()
            error[torch.arange(len(y), device=y.device), y] -= 1
            grad[:, :-1] += error.T @ x
            grad[:, -1] += error.sum(0)
        grad /= count
        grad[:, :-1] += penalty * weight[:, :-1]
        weight.grad = grad
        return value / count + penalty / 2 * weight[:, :-1].square().sum()

    optimizer.step(closure)
    return Probe(weight[:, :-1].clone(), weight[:, -1].clone())


@torch.no_grad()
def linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Probe, float]:
    """The probe of training features [N, W] with labels int64 [N], and the penalty it was fitted with.

    Features are shifted and scaled to mean 0 and variance 1 by the training samples. Every penalty is tried (loosely)
    on all but a fifth of them, drawn at random; the one with the best accuracy there (of equals the
    strongest) is used on all. Ranks share the penalties. Raises DataError where there are too few samples.
    """
    if not (split := int(len(features) * _HELD_OUT)):
        raise DataError(f"--train-data: {len(features)} training samples are too few for a linear probe")
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / scale
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held, rest = order[:split], order[split:]
    found: list[tuple[float, float]] = []
    probe: Probe | None = None
    for penalty in sorted(penalties, reverse=True)[rank() :: world_size()]:  # the weaker from where the stronger ended
        probe = fit_logistic(
            x[rest], labels[rest], classes=classes, penalty=penalty, steps=200, tolerance=1e-5, start=probe
        )
        found.append(((probe.scores(x[held]).argmax(1) == labels[held]).double().mean().item(), penalty))
    best = max(item for part in gather_objects(found) for item in part)[1]
    weight, bias = fit_logistic(x, labels, classes=classes, penalty=best)
    weight = weight / scale
    return Probe(weight, bias - weight @ mean), best
