"""Votes of nearest neighbours against a plain loop."""

import pytest
import torch
from torch.nn import functional as F

from cosmos_ssl.evaluation.knn import knn_scores


@pytest.mark.parametrize("k", [1, 7, 500])
def test_votes_equal_a_plain_loop(k):
    torch.manual_seed(0)
    train, test, labels = torch.randn(40, 6), torch.randn(9, 6), torch.randint(0, 5, (40,))
    votes = knn_scores(train, labels, test, classes=5, k=k)
    for row, x in zip(votes, test, strict=True):
        cosines = F.cosine_similarity(train, x[None])
        expected = torch.zeros(5)
        for i in cosines.argsort(descending=True)[:k]:
            expected[labels[i]] += torch.exp(cosines[i] / 0.07)
        torch.testing.assert_close(row, (expected / expected.sum()).masked_fill(expected == 0, -torch.inf))


def test_a_sharp_temperature_stays_finite():
    votes = knn_scores(torch.eye(3), torch.arange(3), torch.eye(3), classes=3, temperature=1e-3)
    torch.testing.assert_close(votes, torch.eye(3).masked_fill(torch.eye(3) == 0, -torch.inf))


def test_fewer_neighbours_are_told(caplog):
    knn_scores(torch.eye(3), torch.arange(3), torch.eye(3), classes=3, k=3)
    assert not caplog.text
    knn_scores(torch.eye(3), torch.arange(3), torch.eye(3), classes=3, k=4)
    assert "k: 3 neighbours vote, since there are no more training pictures than that; 4 were asked for" in caplog.text
