"""Linear classification of frozen features: multinomial logistic regression by L-BFGS, its penalty chosen on held-out
samples.

Every rank holds its own rows of the features, and all ranks compute one fit together.

Shape letters: N samples of all ranks, n samples of this rank, W width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation.samples import share
from cosmos_ssl.evaluation.sharded import Sharded
from cosmos_ssl.functional import all_sum

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
    """Minimize mean cross-entropy + penalty / 2 |weight|^2 over the samples of all ranks; the bias is free.

    ``features`` [n, W] and ``labels`` int64 [n] are those of this rank. All ranks call this function together, and
    all return the same probe. Each evaluation of loss and gradient takes one all-reduce.

    (scikit-learn's LogisticRegression with C = 1 / (N penalty).) It is convex: L-BFGS with strong Wolfe steps
    goes on from ``start`` (default: zeros) until no gradient exceeds ``tolerance``, at most ``steps`` times.
    """
    own, width = features.shape
    count = int(all_sum(torch.tensor(own, device=features.device)))
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
        sums = weight.new_zeros(weight.numel() + 1)  # gradient and loss, for a single all-reduce
        grad = sums[:-1].view_as(weight)
        for start in range(0, own, rows):
            x, y = features[start : start + rows], labels[start : start + rows]
            logs = F.log_softmax(torch.addmm(weight[:, -1], x, weight[:, :-1].T), 1)
            sums[-1] -= logs.gather(1, y[:, None]).sum()
            error = logs.exp_()
            error[torch.arange(len(y), device=y.device), y] -= 1
            grad[:, :-1] += error.T @ x
            grad[:, -1] += error.sum(0)
        sums = all_sum(sums) / count
        weight.grad = sums[:-1].view_as(weight)
        weight.grad[:, :-1] += penalty * weight[:, :-1]
        return sums[-1] + penalty / 2 * weight[:, :-1].square().sum()

    optimizer.step(closure)
    return Probe(weight[:, :-1].clone(), weight[:, -1].clone())


@torch.no_grad()
def linear_probe(
    features: Sharded | Tensor,
    labels: Tensor,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Probe, float]:
    """The probe of training features [N, W] with labels int64 [N], and the penalty it was fitted with.

    All ranks call this function together. Of ``Sharded`` features each rank reads its own rows alone; of a tensor that
    every rank holds, an equal share.

    Features are shifted and scaled to mean 0 and variance 1 by the training samples. Every penalty is tried (loosely)
    on all but a fifth of them, drawn at random; the one with the best accuracy there (of equals the
    strongest) is used on all. Raises DataError where there are too few samples.
    """
    count = len(features)
    if not (split := int(count * _HELD_OUT)):
        raise DataError(f"--train-data: {count} training samples are too few for a linear probe")
    rows, own = _own_rows(features)
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:split]] = True
    order = held[own].int().argsort(stable=True).to(rows.device)  # held-out samples last: slices need no copy
    fitted_on = len(order) - int(held[own].sum())
    x, y = rows[order], labels[own][order]
    mean = all_sum(x.sum(0)) / count
    x -= mean
    norm = torch.linalg.vector_norm(x, dim=0)  # the squares of all samples are not held
    scale = (all_sum(norm.square()) / (count - 1)).sqrt().clamp_min(1e-6)
    x /= scale
    best, best_hits = 0.0, -1
    probe: Probe | None = None
    for penalty in sorted(penalties, reverse=True):  # the weaker from where the stronger ended
        probe = fit_logistic(
            x[:fitted_on], y[:fitted_on], classes=classes, penalty=penalty, steps=200, tolerance=1e-5, start=probe
        )
        hits = int(all_sum((probe.scores(x[fitted_on:]).argmax(1) == y[fitted_on:]).sum()))
        if hits > best_hits:
            best, best_hits = penalty, hits
    weight, bias = fit_logistic(x, y, classes=classes, penalty=best)
    weight = weight / scale
    return Probe(weight, bias - weight @ mean), best


def _own_rows(features: Sharded | Tensor) -> tuple[Tensor, slice]:
    """Return the features that this rank fits on, and where they lie among those of all ranks."""
    if isinstance(features, Sharded) and features.shared:
        return features.own, slice(*features.bounds)
    rows = features.own if isinstance(features, Sharded) else features
    own = share(range(len(rows)))
    bounds = slice(own[0], own[-1] + 1) if own else slice(0, 0)
    return rows[bounds], bounds
