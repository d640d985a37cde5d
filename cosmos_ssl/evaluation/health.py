"""How healthy features are: effective rank, alignment, uniformity, and the entropy of matches.

Shape letters: N samples, W width, D shared width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-7
_ROWS = 1024


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of features [N, W], as shares of their sum: 1 is a single direction.

    (RankMe, arXiv 2210.02885, section 3: neither centred nor normalised; 1e-7 is added to each share.)
    """
    values = torch.linalg.svdvals(features.float()).double()
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + _EPSILON
    return float((-shares * shares.log()).sum().exp())


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of positive pairs of unit vectors [N, D]: 0 where they are equal, 2 at chance.

    (arXiv 2005.10242, section 4.1, alpha 2.)
    """
    return (first - second).double().square().sum(1).mean().item()


@torch.no_grad()
def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-2 squared distance) over different pairs of unit vectors [N, D]: 0 where all are equal.

    (arXiv 2005.10242, section 4.1, t 2.) Raises ValueError for fewer than two.
    """
    if (count := len(features)) < 2:
        raise ValueError("uniformity is of two samples at least")
    features = features.double()
    total = sum(
        torch.cdist(rows, features, compute_mode="donot_use_mm_for_euclid_dist").square().mul(-2).exp().sum()
        for rows in features.split(_ROWS)
    )
    return float(torch.as_tensor((total - count) / (count * (count - 1))).log())


@torch.no_grad()
def match_entropy(images: Tensor, texts: Tensor, scale: float) -> float:
    """Mean entropy in nats of a picture's softmax over ``scale`` x cosine with texts, both [N, D]: ln N is a guess."""
    logs = [(scale * rows.double() @ texts.double().T).log_softmax(1) for rows in images.split(_ROWS)]
    return -sum(float((log.exp() * log).sum()) for log in logs) / len(images)
