"""Effective rank, alignment, uniformity and entropy against the papers' formulas, written out."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cosmos_ssl.evaluation.health import alignment, effective_rank, match_entropy, uniformity

torch.manual_seed(0)
X, Y = F.normalize(torch.randn(7, 4), dim=1), F.normalize(torch.randn(7, 4), dim=1)


def test_effective_rank():
    """RankMe's equation 1 by numpy; of k equal singular values it is k, of equal rows 1."""
    values = np.linalg.svd(X.double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert effective_rank(X) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert effective_rank(torch.eye(6)[:, :5]) == pytest.approx(5, abs=1e-4)
    assert effective_rank(X[:1].repeat(9, 1)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(3, 3)) == pytest.approx(1, abs=1e-3)  # not a NaN


def test_alignment_and_uniformity():
    """The reference code's definitions: torch.pdist over all pairs, t and alpha of 2."""
    assert uniformity(X) == pytest.approx(torch.pdist(X).pow(2).mul(-2).exp().mean().log().item(), abs=1e-6)
    assert alignment(X, Y) == pytest.approx((X - Y).norm(dim=1).pow(2).mean().item(), abs=1e-6)
    assert uniformity(X[:1].repeat(2000, 1)) == pytest.approx(0, abs=1e-9) and alignment(X, X) == 0
    with pytest.raises(ValueError, match="two samples"):
        uniformity(X[:1])


def test_match_entropy():
    wanted = torch.distributions.Categorical(logits=5 * X @ Y.T).entropy().mean().item()
    assert match_entropy(X, Y, 5) == pytest.approx(wanted, abs=1e-6)
    assert match_entropy(X, Y, 0) == pytest.approx(math.log(7))
