"""Arrays on their way to the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_ssl.functional import upload


def test_on_the_host_memory_is_shared() -> None:
    array = np.arange(3)
    (tensor,) = upload("cpu", array)
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2]


def test_arrays_of_any_kind_make_one_pinned_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device stood in for by the host: what is pinned is copied once, without waiting, and read as it was."""
    copies: list[tuple[object, bool]] = []

    class Pinned:
        def __init__(self, host: Tensor) -> None:
            self.host = host

        def to(self, device: object, non_blocking: bool) -> Tensor:
            copies.append((device, non_blocking))
            return self.host.clone()

    monkeypatch.setattr(Tensor, "pin_memory", lambda host: Pinned(host))
    arrays = [
        np.array([[True], [False]]),
        np.arange(6).reshape(2, 3).T,
        torch.tensor(0.5, dtype=torch.float64),
        np.empty((2, 0), np.float32),
        torch.arange(7, dtype=torch.int32)[::2],
    ]
    found = upload("cuda:1", *arrays)
    assert copies == [("cuda:1", True)]
    for array, tensor in zip(arrays, found, strict=True):
        assert torch.equal(tensor, torch.as_tensor(array)) and tensor.dtype == torch.as_tensor(array).dtype
