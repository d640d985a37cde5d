"""Products of what runs, compiled or not."""

from __future__ import annotations

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cosmos_ssl.functional.products import Products


def test_the_products_of_a_step_are_counted_whether_or_not_it_is_compiled() -> None:
    layer = torch.nn.Linear(8, 16)
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for function in (lambda x: layer(x).sin(), torch.compile(lambda x: layer(x).sin(), backend=counter)):
        for _ in range(2):
            with Products() as products:
                function(torch.ones(4, 8, requires_grad=True)).sum().backward()
            found.append(products.flops)
    assert found == [3 * 2 * 4 * 8 * 16] * 4  # forward, and back to weights and input
    assert counter.frame_count == 1
