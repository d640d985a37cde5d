"""Ranks and metrics of retrieval, against hand-worked cases, a plain sort and torchmetrics."""

import math

import pytest
import torch
from torchmetrics.retrieval import RetrievalRecall

from cosmos_ssl.evaluation import retrieval
from cosmos_ssl.evaluation.retrieval import retrieval_metrics, retrieval_ranks


def sorted_ranks(images, texts, owners):
    """What a stable sort of every row says."""
    scores = images @ texts.T
    by_image = scores.argsort(dim=1, descending=True, stable=True)
    by_text = scores.T.argsort(dim=1, descending=True, stable=True)
    image_ranks = torch.stack([(owners[row] == i).int().argmax() for i, row in enumerate(by_image)])
    return image_ranks, torch.stack([(row == owner).int().argmax() for row, owner in zip(by_text, owners, strict=True)])


def some(count, texts, rounded=False, width=8):
    torch.manual_seed(count)
    owners = torch.cat([torch.arange(count), torch.randint(0, count, (texts - count,))]).sort().values
    pair = torch.randn(count, width), torch.randn(texts, width)
    return (*(tensor.round() if rounded else tensor for tensor in pair), owners)


def test_hand_worked():
    # scores:   text 0 (of 0)  text 1 (of 0)  text 2 (of 1)  text 3 (of 2)
    # image 0        .1             .9             .5             .4
    # image 1        .2             .8             .3             .6
    # image 2        .0             .1             .2             .1
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.4], [0.2, 0.8, 0.3, 0.6], [0.0, 0.1, 0.2, 0.1]])
    found = retrieval_metrics(torch.eye(3), scores.T.contiguous(), torch.tensor([0, 0, 1, 2]), ks=(1, 2))
    # images: best own text at 1, at 3, and at 3 (text 1 scores the same and comes first); texts: at 2, 1, 2, 3
    assert found == pytest.approx(
        {
            "image_to_text_mean_rank": 7 / 3,
            "image_to_text_median_rank": 3,
            "image_to_text_R@1": 1 / 3,
            "image_to_text_R@2": 1 / 3,
            "text_to_image_mean_rank": 2,
            "text_to_image_median_rank": 2,
            "text_to_image_R@1": 1 / 4,
            "text_to_image_R@2": 3 / 4,
        }
    )


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize(("count", "texts"), [(1, 1), (30, 30), (248, 249), (600, 1700)])
def test_equals_a_stable_sort(count, texts, rounded):
    """Across the borders of tiles, with few and with many equal scores."""
    images, encoded, owners = some(count, texts, rounded)
    for found, expected in zip(
        retrieval_ranks(images, encoded, owners), sorted_ranks(images, encoded, owners), strict=True
    ):
        assert torch.equal(found, expected)


def test_small_tiles(monkeypatch):
    monkeypatch.setattr(retrieval, "_ROWS", 5)
    monkeypatch.setattr(retrieval, "_COLUMNS", 7)
    images, encoded, owners = some(23, 90, rounded=True)
    for found, expected in zip(
        retrieval_ranks(images, encoded, owners), sorted_ranks(images, encoded, owners), strict=True
    ):
        assert torch.equal(found, expected)


def test_more_texts_an_image_than_a_byte_counts():
    images, encoded, owners = some(3, 7000)
    for found, expected in zip(
        retrieval_ranks(images, encoded, owners), sorted_ranks(images, encoded, owners), strict=True
    ):
        assert torch.equal(found, expected)


def test_texts_in_any_order():
    images, encoded, owners = some(300, 900)
    order = torch.randperm(900)
    image_ranks, text_ranks = retrieval_ranks(images, encoded, owners)
    shuffled = retrieval_ranks(images, encoded[order], owners[order])
    assert torch.equal(shuffled[0], image_ranks)
    assert torch.equal(shuffled[1], text_ranks[order])


def test_recall_equals_torchmetrics():
    images, encoded, owners = some(60, 60)
    metric = RetrievalRecall(top_k=5)
    scores = images @ encoded.T
    metric.update(
        scores.flatten(), torch.eye(60, dtype=torch.bool).flatten(), indexes=torch.arange(60).repeat_interleave(60)
    )
    assert retrieval_metrics(images, encoded, owners)["image_to_text_R@5"] == pytest.approx(metric.compute().item())


def test_collapsed_features_are_at_chance():
    same = torch.ones(500, 4)
    found = retrieval_metrics(same, same, torch.arange(500))
    assert found["image_to_text_R@1"] == found["text_to_image_R@1"] == pytest.approx(1 / 500)
    assert found["image_to_text_mean_rank"] == pytest.approx(250.5)


@pytest.mark.parametrize("side", ["images", "texts"])
def test_what_is_no_number_is_never_found(side):
    images, encoded, owners = some(20, 20)
    (images if side == "images" else encoded).fill_(math.nan)
    assert retrieval_metrics(images, encoded, owners)["image_to_text_mean_rank"] == 20


def test_an_image_without_text_is_refused():
    with pytest.raises(ValueError, match="each of the 3 images needs a text"):
        retrieval_ranks(torch.eye(3), torch.eye(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="another image"):
        retrieval_ranks(torch.eye(2), torch.eye(2), torch.tensor([0, 5]))
