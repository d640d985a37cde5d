"""The model of one role: parts of any name."""

from __future__ import annotations

import torch
from torch import nn

from cosmos_ssl.models.model import Named


def test_parts_may_be_named_as_what_modules_have() -> None:
    names = dir(nn.ModuleDict({}))
    parts = Named({name: nn.Linear(1, 1) for name in names})
    assert {"forward", "keys", "training", "state_dict", "_modules"} <= set(names) == set(parts)
    assert all(parts[name] is part for name, part in parts.items()) and len(list(parts.parameters())) == 2 * len(names)
    assert not any(module.training for module in parts.eval().modules()) and all(
        module.training for module in parts.train().modules()
    )
    tensors = {name: torch.rand_like(value) for name, value in parts.state_dict().items()}
    assert tensors.keys() == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    parts.to(torch.float64).load_state_dict(tensors)
    assert all(torch.equal(value, tensors[name].double()) for name, value in parts.state_dict().items())
