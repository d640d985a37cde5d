"""Rows that ranks share: what is found of them is what one process finds, and no rank is sent them all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosmos_ssl.evaluation import retrieval, sharded
from cosmos_ssl.evaluation.classification import accuracy
from cosmos_ssl.evaluation.knn import knn_scores, neighbours
from cosmos_ssl.evaluation.protocols import Labelled, trained_ahead
from cosmos_ssl.evaluation.retrieval import retrieval_ranks, sharded_ranks
from cosmos_ssl.evaluation.sharded import Sharded

WIDTH, BLOCK = 8, 56  # seven rows of a block
IMAGES = 300


def share_of(rows: Tensor, bounds: tuple[float, ...] = (0.2, 0.2)) -> Sharded:
    """The rows of three ranks, of which the second has none."""
    ends = [0, *(int(len(rows) * bound) for bound in bounds), len(rows)]
    own = rows[ends[dist.get_rank()] : ends[dist.get_rank() + 1]]
    return Sharded.gathered([own[:2], own[2:]] if len(own) else [])


def _rows(results: Any) -> None:
    """Bytes of any type travel, and every way to cut them gives the rows of the whole."""
    for rows in (torch.randn(23, 2, 3), torch.randn(23).bfloat16(), torch.arange(23) % 5, torch.randn(23, 4) > 0):
        own = share_of(rows)
        first, last = own.bounds
        assert own.ends == (0, 4, 4, 23) and torch.equal(own.own, rows[first:last])
        assert torch.equal(own.whole(), rows) and torch.equal(own.block(3, 9), rows[3:9])
        assert [(at, torch.equal(block, rows[at : at + 7])) for at, block in own.blocks(5, beyond=2)] == [
            (at, True) for at in range(0, 23, 5)
        ]
        moved = own.moved([0, 1, 12, 23])
        first, last = moved.bounds
        assert torch.equal(moved.own, rows[first:last]) and torch.equal(moved.whole(), rows)
    nothing = Sharded.gathered([])
    assert len(nothing) == 0 and not nothing.whole().numel()


def _retrieval(results: Any) -> None:
    """Tiles that end anywhere, ranks with few of them or none, many equal scores, and any number of texts an image."""

    def distance(images: Tensor, texts: Tensor) -> Tensor:
        return -torch.cdist(images, texts, p=1)

    for count, texts in ((1, 1), (23, 90)):
        owners = torch.cat([torch.arange(count), torch.randint(0, count, (texts - count,))]).sort().values
        for rows, columns, block in ((5, 7, 2), (248, 4096, 16)):
            retrieval._ROWS, retrieval._COLUMNS, retrieval._BLOCK = rows, columns, block
            for change in (torch.Tensor.round, torch.Tensor.clone):
                images, encoded = change(torch.randn(count, WIDTH)), change(torch.randn(texts, WIDTH))
                for score in (retrieval.dot, distance):
                    expected = retrieval_ranks(images, encoded, owners, score=score)
                    found = sharded_ranks(share_of(images), share_of(encoded, (0.5, 0.9)), owners, score=score)
                    assert all(map(torch.equal, found, expected)), (count, rows, score)
    with pytest.raises(ValueError, match="each of the 3 images needs a text of its own"):
        sharded_ranks(share_of(torch.eye(3)), share_of(torch.eye(3)), torch.tensor([0, 0, 1]))


def _neighbours(results: Any) -> None:
    """Exact unit vectors, most of whose cosines are equal, to the bit; others but for the last digit."""
    exact = torch.zeros(60, WIDTH).scatter_(1, torch.rand(60, WIDTH).argsort(1)[:, :4], 0.5)
    for rows, tolerance in ((exact * torch.randn(60, WIDTH).sign(), 0.0), (torch.randn(60, WIDTH), 2e-6)):
        train, labels, test = rows[:45], torch.randint(0, 4, (45,)), rows[45:]
        for k in (1, 5, 45):
            own = share_of(test, (0.3, 0.8))
            found, expected = neighbours(share_of(train), own.own, k), neighbours(train, test, k)
            torch.testing.assert_close(Sharded(found[0], own.ends).whole(), expected[0], rtol=0, atol=tolerance)
            assert torch.equal(Sharded(found[1], own.ends).whole(), expected[1])
            scores = knn_scores(share_of(train), labels, own.own, classes=4, k=k)
            whole = knn_scores(train, labels, test, classes=4, k=k)
            torch.testing.assert_close(Sharded(scores, own.ends).whole(), whole, rtol=0, atol=10 * tolerance)
        told = [Labelled(share_of(part), [f"class {n % 4}" for n in range(len(part))], []) for part in (train, test)]
        ahead, numbers = trained_ahead(*told, knn_scores)
        whole = knn_scores(train, torch.arange(45) % 4, test, classes=4)
        assert torch.equal(ahead < 1, torch.tensor(accuracy_hits(whole, numbers)))


def accuracy_hits(scores: Tensor, labels: Tensor) -> list[bool]:
    """Of each picture, whether its label is the first."""
    return [accuracy(row[None], label[None])["top1"] == 1 for row, label in zip(scores, labels, strict=True)]


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def _memory(results: Any) -> None:
    """What is sent, pickled, and made at once, for rows of which each rank has about a third."""
    sent: list[int] = []
    told: list[int] = []
    broadcast, gather = dist.broadcast, dist.all_gather_object

    def recorded(tensor: Tensor, *given: Any, **named: Any) -> Any:
        sent.append(tensor.nbytes)
        return broadcast(tensor, *given, **named)

    def pickled(found: list[Any], value: Any, **named: Any) -> None:
        told.append(len(pickle.dumps(value)))
        gather(found, value, **named)

    dist.broadcast, dist.all_gather_object = recorded, pickled
    images, texts = (share_of(torch.randn(count, WIDTH), (0.3, 0.6)) for count in (IMAGES, 2 * IMAGES))
    retrieval._ROWS, retrieval._COLUMNS, retrieval._BLOCK = 5, 7, 2
    with Largest() as made:
        sharded_ranks(images, texts, torch.arange(IMAGES).repeat_interleave(2))
        neighbours(images, texts.own, 1)
    results[dist.get_rank()] = max(sent), max(told), made.bytes


def _rank(rank: int, world: int, path: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    sharded.BLOCK = BLOCK
    for part in (_rows, _retrieval, _neighbours, _memory):
        torch.manual_seed(0)
        part(results)
    dist.destroy_process_group()


def test_three_ranks_find_what_one_finds_and_hold_their_share(in_ranks: Callable[..., dict[Any, Any]]) -> None:
    results, row = in_ranks(_rank, 3), 4 * WIDTH
    for sent, told, made in results.values():
        assert sent <= 3 * 7 * row, "two tiles of seven texts, and seven more"
        assert told < 300, "shapes alone are pickled"
        assert made <= 0.45 * 2 * IMAGES * row, "a rank's own texts, and no more"
