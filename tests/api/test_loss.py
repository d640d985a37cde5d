"""What losses are made of: unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api.loss import _Unit


def test_unit_vectors_of_a_card_are_those_of_the_host() -> None:
    """Among them one without a direction; and gradients of gradients."""
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1, 2] = 0
    scale = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))

    def results(unit: Tensor, given: Tensor) -> list[Tensor]:
        return [unit, *torch.autograd.grad((unit * scale).sum(), given)]

    given = x.clone().requires_grad_()
    expected, found = results(F.normalize(given, dim=-1), given), results(_Unit.apply(given)[0], given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda y: _Unit.apply(y)[0], x[0].clone().requires_grad_())
