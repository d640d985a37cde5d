"""Image-text retrieval: ranks by counting, and the metrics of them under OpenCLIP's names.

Shape letters: N images, M texts (any number of them an image); "..." is what a score wants to know of one, by default a
vector [D].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor

from cosmos_ssl.evaluation.bootstrap import Outcome

Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Images [n, ...] and texts [m, ...] -> scores [n, m]."""

_WAYS = ("image_to_text", "text_to_image")
_ROWS = 248  # images of one tile; below 256, so that a count fits a byte
_COLUMNS = 4096  # texts of one tile, at most


def dot(images: Tensor, texts: Tensor) -> Tensor:
    """The usual score."""
    return images @ texts.T


def retrieval_metrics(
    images: Tensor, texts: Tensor, owners: Tensor, ks: Sequence[int] = (1, 5, 10), *, score: Score = dot
) -> dict[str, float]:
    """Recall and ranks both ways: ``image_to_text_R@1``, ``text_to_image_mean_rank``, ...

    ``images`` [N, ...], ``texts`` [M, ...], ``owners`` int [M]: the image of each text. R@k is a share (0..1); ranks
    begin at 1, and the median is rounded down (OpenCLIP's). Raises ValueError as ``retrieval_ranks`` does.
    """
    return rank_metrics(retrieval_ranks(images, texts, owners, score=score), ks)


def rank_metrics(found: tuple[Tensor, Tensor], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The metrics of what ``retrieval_ranks`` returns."""
    metrics: dict[str, float] = {}
    for name, ranks in zip(_WAYS, found, strict=True):
        metrics[f"{name}_mean_rank"] = ranks.double().mean().item() + 1
        metrics[f"{name}_median_rank"] = float(int(ranks.double().quantile(0.5).item()) + 1)
        metrics |= {f"{name}_R@{k}": (ranks < k).double().mean().item() for k in ks}
    return metrics


def rank_outcomes(found: tuple[Tensor, Tensor], owners: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Outcome]:
    """The same, but medians, as outcomes of pictures; ``owners`` int [M]."""
    outcomes: dict[str, Outcome] = {}
    for name, ranks, units in zip(_WAYS, found, (torch.arange(len(found[0])), owners), strict=True):
        ranks = ranks.cpu()
        parts = {f"{name}_mean_rank": ranks + 1, **{f"{name}_R@{k}": ranks < k for k in ks}}
        outcomes |= {metric: Outcome(units, over, torch.ones_like(units)) for metric, over in parts.items()}
    return outcomes


def fold_metrics(images: Tensor, texts: Tensor, owners: Tensor, size: int, *, score: Score = dot) -> dict[str, float]:
    """The mean of each metric over folds of ``size`` pictures in their order, each searched by itself with its texts.

    (COCO's "1k": five folds of 1,000; VSE++, arXiv 1707.05612.) Shapes and what is raised as ``retrieval_metrics``;
    pictures after the last whole fold are left out.
    """
    found = []
    for start in range(0, len(images) // size * size, size):
        own = (owners >= start) & (owners < start + size)
        found.append(retrieval_metrics(images[start : start + size], texts[own], owners[own] - start, score=score))
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


@torch.no_grad()
def retrieval_ranks(images: Tensor, texts: Tensor, owners: Tensor, *, score: Score = dot) -> tuple[Tensor, Tensor]:
    """Return how many candidates stand before the right one: of each image's best text int64 [N], of each text's image
    [M].

    The result is that of a stable sort by falling score: of equal scores the
    earlier candidate comes first (texts in the order of their images); one that is not a number beats all.
    Every score is computed once, in tiles, so memory does not grow with N x M.
    Raises ValueError where an image has no text.
    """
    owners = owners.to(images.device)
    counts = torch.bincount(owners, minlength=len(images))
    if len(counts) != len(images) or not counts.all():
        raise ValueError(f"each of the {len(images)} images needs a text of its own, and no text another image")
    order = owners.argsort(stable=True)
    texts, owners = texts[order], owners[order]
    rows = [(start, min(start + _ROWS, len(images))) for start in range(0, len(images), _ROWS)]
    ends = [0, *(int(end) for end in counts.cumsum(0).tolist())]
    columns = [(ends[start], ends[stop]) for start, stop in rows]

    best, true = images.new_empty(len(images)), images.new_empty(len(texts))
    image_ranks, text_ranks = torch.full_like(counts, len(texts) - 1), torch.full_like(owners, len(images) - 1)
    for (r0, r1), (c0, c1) in zip(rows, columns, strict=True):  # tiles that hold the right answers
        scores = score(images[r0:r1], texts[c0:c1])
        best[r0:r1], true[c0:c1], *beaten = _own_tile(scores, owners[c0:c1] - r0)
        image_ranks[r0:r1] -= beaten[0]
        text_ranks[c0:c1] -= beaten[1]
    for (r0, r1), (c0, c1) in zip(rows, columns, strict=True):
        for start, stop, later in ((0, c0, False), (c1, len(texts), True)):  # texts of earlier images, of later ones
            for k0 in range(start, stop, _COLUMNS):
                k1 = min(k0 + _COLUMNS, stop)
                scores = score(images[r0:r1], texts[k0:k1])
                # the stable order: at equal scores the later text loses, and the later image
                image_ranks[r0:r1] -= _counts(scores, best[r0:r1, None], equal=later, dim=1)
                text_ranks[k0:k1] -= _counts(scores, true[k0:k1], equal=not later, dim=0)
    return image_ranks, torch.empty_like(text_ranks).index_copy_(0, order, text_ranks)


def best_first(scores: Tensor) -> list[int]:
    """Candidates of a query by scores [n] (texts in the order of their images), as ``retrieval_ranks`` orders them."""
    return cast(list[int], scores.argsort(descending=True, stable=True).tolist())


def _own_tile(scores: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A tile of some images and all their texts: best own score [R], true scores [C], candidates beaten [R] and [C]."""
    row = torch.arange(scores.shape[0], device=scores.device)[:, None]
    column = torch.arange(scores.shape[1], device=scores.device)
    own = row == owners
    best = scores.masked_fill(~own, -torch.inf).amax(1)
    place = torch.where(own & (scores == best[:, None]), column, scores.shape[1]).amin(1)
    true = scores[owners, column]
    beaten_texts = (scores < best[:, None]) | ((scores == best[:, None]) & (column > place[:, None]))
    beaten_images = (scores < true) | ((scores == true) & (row > owners))
    return best, true, beaten_texts.sum(1), beaten_images.sum(0)


def _counts(scores: Tensor, limit: Tensor, *, equal: bool, dim: int) -> Tensor:
    """Return how many scores [R, C] lie below the limit (or equal it), along a dimension.

    Eight truth values are added at once as the bytes of one integer, which costs a tenth of summing them.
    """
    rows, columns = scores.shape
    hits = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.bool, device=scores.device)
    (torch.le if equal else torch.lt)(scores, limit, out=hits[:, :columns])
    packed = hits.view(torch.int64)
    if dim == 0:
        return packed.sum(0).view(torch.uint8)[:columns].long()
    parts = [part.sum(1).view(torch.uint8).view(rows, 8).sum(1) for part in packed.split(255, 1)]
    return cast(Tensor, sum(parts))
