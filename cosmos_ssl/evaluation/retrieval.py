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
from cosmos_ssl.evaluation.sharded import Sharded
from cosmos_ssl.functional import all_sum

Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Images [n, ...] and texts [m, ...] -> scores [n, m]."""

_WAYS = ("image_to_text", "text_to_image")
_ROWS = 248  # images of one tile; below 256, so that a count fits a byte
_COLUMNS = 4096  # texts of one tile, at most
_BLOCK = 16  # such tiles of a block of texts that travels


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
    order = owners.argsort(stable=True).to(images.device)
    found = sharded_ranks(Sharded(images), Sharded(texts[order]), owners.sort(stable=True).values, score=score)
    return found[0], torch.empty_like(found[1]).index_copy_(0, order, found[1])


@torch.no_grad()
def sharded_ranks(images: Sharded, texts: Sharded, owners: Tensor, *, score: Score = dot) -> tuple[Tensor, Tensor]:
    """``retrieval_ranks`` of images and texts that ranks share, by the same tiles; called by all ranks, of which each
    gets the ranks of all.

    ``texts`` stand in the order of their images: ``owners`` int [M] rise. Each rank keeps its images; their texts, and
    then all texts block by block, travel. Beside its share a rank holds a block and 16 bytes for each image and text.
    Raises ValueError where an image has no text.
    """
    device = images.own.device
    owners = owners.to(device)
    counts = torch.bincount(owners, minlength=len(images))
    if len(counts) != len(images) or not counts.all():
        raise ValueError(f"each of the {len(images)} images needs a text of its own, and no text another image")
    ends = [0, *(int(end) for end in counts.cumsum(0).tolist())]
    rows = [(start, min(start + _ROWS, len(images))) for start in range(0, len(images), _ROWS)]
    if images.shared:  # whole tiles, each with all texts of its images
        size = len(images.ends) - 1
        borders = [min(len(rows) * at // size * _ROWS, len(images)) for at in range(size + 1)]
        images, texts = images.moved(borders), texts.moved([ends[border] for border in borders])
    (r_first, r_last), (c_first, _) = images.bounds, texts.bounds
    tiles = [(r0, r1, ends[r0], ends[r1]) for r0, r1 in rows if r_first <= r0 < r_last]

    own, best, true = images.own, images.own.new_empty(r_last - r_first), texts.own.new_empty(len(texts.own))
    texts_beaten = torch.zeros(r_last - r_first, dtype=torch.long, device=device)
    images_beaten = torch.zeros(len(texts), dtype=torch.long, device=device)
    for r0, r1, c0, c1 in tiles:  # tiles that hold the right answers
        at, of = slice(r0 - r_first, r1 - r_first), slice(c0 - c_first, c1 - c_first)
        scores = score(own[at], texts.own[of])
        best[at], true[of], texts_beaten[at], images_beaten[c0:c1] = _own_tile(scores, owners[c0:c1] - r0)
    true = Sharded(true, texts.ends).whole()
    step = _BLOCK * _COLUMNS
    for first, block in texts.blocks(step, beyond=_COLUMNS):
        for r0, r1, c0, c1 in tiles:
            at = slice(r0 - r_first, r1 - r_first)
            for start, stop, later in (
                (0, c0, False),
                (c1, len(texts), True),
            ):  # texts of earlier images, of later ones
                begun = start + max(0, -(-(first - start) // _COLUMNS)) * _COLUMNS
                for k0 in range(begun, min(stop, first + step) if texts.shared else stop, _COLUMNS):
                    k1 = min(k0 + _COLUMNS, stop)
                    scores = score(own[at], block[k0 - first : k1 - first])
                    # the stable order: at equal scores the later text loses, and the later image
                    texts_beaten[at] += _counts(scores, best[at, None], equal=later, dim=1)
                    images_beaten[k0:k1] += _counts(scores, true[k0:k1], equal=not later, dim=0)
    if images.shared:
        images_beaten = all_sum(images_beaten.cpu()).to(device)
    image_ranks = len(texts) - 1 - Sharded(texts_beaten, images.ends).whole()
    return image_ranks, len(images) - 1 - images_beaten


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
