"""Classification by nearest neighbours on frozen features.

Shape letters: N training pictures, M test pictures, W width, C classes.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from cosmos_ssl.api import normalise
from cosmos_ssl.functional import rank

_log = logging.getLogger("cosmos_ssl.evaluation")


@torch.no_grad()
def knn_scores(
    train: Tensor, labels: Tensor, test: Tensor, *, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes [M, C] of the ``k`` nearest of ``train`` [N, W] with ``labels`` int64 [N] for ``test`` [M, W].

    A neighbour's vote is exp(cosine / temperature) (DINO, arXiv 2104.14294, appendix; k of 20 is its best), here as a
    softmax over the neighbours, so that no temperature overflows. A class that none of them has gets minus infinity.
    """
    train, test = normalise(train), normalise(test)
    if k > len(train) and rank() == 0:
        _log.warning(
            "k: %s neighbours vote, since there are no more training pictures than that; %s were asked for",
            len(train),
            k,
        )
    k = min(k, len(train))
    votes = test.new_zeros(len(test), classes)
    rows = max(1, 2**26 // len(train))  # a quarter of a gigabyte of cosines at a time
    for start in range(0, len(test), rows):
        cosines, places = (test[start : start + rows] @ train.T).topk(k, dim=1)
        votes[start : start + rows].scatter_add_(1, labels[places], (cosines / temperature).softmax(1))
    return votes.masked_fill_(votes == 0, -torch.inf)
