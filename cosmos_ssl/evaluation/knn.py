"""Classification by nearest neighbours on frozen features.

Shape letters: N training pictures, M test pictures, W width, C classes.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from cosmos_ssl.api import normalise
from cosmos_ssl.evaluation.sharded import Sharded
from cosmos_ssl.functional import rank

_COSINES = 1 << 26
"""So many at a time: a quarter of a gigabyte."""
_log = logging.getLogger("cosmos_ssl.evaluation")


@torch.no_grad()
def knn_scores(
    train: Tensor | Sharded, labels: Tensor, test: Tensor, *, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes [M, C] of the ``k`` nearest of ``train`` [N, W] with ``labels`` int64 [N] for ``test`` [M, W].

    A neighbour's vote is exp(cosine / temperature) (DINO, arXiv 2104.14294, appendix; k of 20 is its best), here as a
    softmax over the neighbours, so that no temperature overflows. A class that none of them has gets minus infinity.
    Of ``Sharded`` training pictures it is called by all ranks, each with tests of its own (``neighbours``).
    """
    if k > len(train) and rank() == 0:
        _log.warning(
            "k: %s neighbours vote, since there are no more training pictures than that; %s were asked for",
            len(train),
            k,
        )
    cosines, places = neighbours(train, test, min(k, len(train)))
    votes = cosines.new_zeros(len(test), classes)
    votes.scatter_add_(1, labels[places], (cosines / temperature).softmax(1))
    return votes.masked_fill_(votes == 0, -torch.inf)


@torch.no_grad()
def neighbours(train: Tensor | Sharded, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The cosines of the ``k`` nearest of ``train`` [N, W] to each of ``test`` [M, W], falling, and their places
    int64, both [M, k]; of equally near ones the earlier in ``train``.

    Of ``Sharded`` training pictures a block after another travels to all ranks, each of which keeps the k best of its
    own tests. A cosine may then differ in its last digit, since other products are taken at once.
    """
    train = train if isinstance(train, Sharded) else Sharded(train)
    test = normalise(test)
    best = test.new_full((len(test), k), -torch.inf), torch.zeros(len(test), k, dtype=torch.long, device=test.device)
    for first, block in train.blocks():
        block = normalise(block)
        rows = max(1, _COSINES // len(block))
        for start in range(0, len(test), rows):
            cosines, places = _greatest(test[start : start + rows] @ block.T, min(k, len(block)))
            if len(block) == len(train):
                best[0][start : start + rows], best[1][start : start + rows] = cosines, places
                continue
            both = torch.cat([best[0][start : start + rows], cosines], 1)
            where = torch.cat([best[1][start : start + rows], places + first], 1)
            kept, order = both.sort(dim=1, descending=True, stable=True)  # those of earlier blocks come first
            best[0][start : start + rows] = kept[:, :k]
            best[1][start : start + rows] = where.gather(1, order[:, :k])
    return best


def _greatest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` greatest of each row [m, n], falling, and their places; of equal ones the earlier, which ``topk`` does
    not promise.
    """
    found, places = values.topk(min(k + 1, values.shape[1]), dim=1)
    if k < values.shape[1]:
        tied = (found[:, k - 1] == found[:, k]).nonzero()[:, 0]
        found, places = found[:, :k], places[:, :k]
        if len(tied):
            rows, last = values[tied], found[tied, k - 1 :]
            above = rows > last
            level = rows == last
            taken = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
            places[tied] = taken.nonzero()[:, 1].view(-1, k)
    places = places.sort(1).values
    found, order = values.gather(1, places).sort(dim=1, descending=True, stable=True)
    return found, places.gather(1, order)
