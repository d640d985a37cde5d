"""Batches on the device: handed on in order, the next one fetched first where there is a device to copy to."""

from __future__ import annotations

import pytest
import torch

from cosmos_ssl.api import TextGroup
from cosmos_ssl.api.views import CroppedViews
from cosmos_ssl.cost import fake_device
from cosmos_ssl.data.loader import LoadedBatch
from cosmos_ssl.engine import ahead

Happened = list[tuple[str, int]]


def followed(monkeypatch: pytest.MonkeyPatch, device: str, *, fault: Exception | None = None) -> Happened:
    """What happens to three batches, or two and a fault; on streams that are not there."""
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, fake_device._answers()[name])
    monkeypatch.setattr(CroppedViews, "to", lambda views, _: views)
    happened: Happened = []

    def batches():
        try:
            for step in range(3):
                if step == 2 and fault is not None:
                    raise fault
                happened.append(("loaded", step))
                tokens = torch.zeros(1, 1, 4, dtype=torch.int64)
                text = {"global": TextGroup(tokens=tokens, lengths=tokens[..., 0])}
                yield LoadedBatch(step=step, views=CroppedViews(keys=["a"], text=text))
        finally:
            happened.append(("closed", 0))

    try:
        for batch in ahead.on_device(batches(), torch.device(device)):
            happened.append(("used", batch.step))
    except OSError:
        happened.append(("failed", 0))
    return happened


def test_the_next_batch_is_copied_before_one_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, used = [("loaded", n) for n in range(3)], [("used", n) for n in range(3)]
    closed, failed = ("closed", 0), ("failed", 0)
    in_turn = [loaded[0], used[0], loaded[1], used[1], loaded[2], used[2], closed]
    assert followed(monkeypatch, "cpu") == in_turn
    assert followed(monkeypatch, "cuda") == [loaded[0], loaded[1], used[0], loaded[2], used[1], closed, used[2]]
    # storage that fails ends the run after the step before
    found = followed(monkeypatch, "cuda", fault=OSError())
    assert found == [loaded[0], loaded[1], used[0], closed, used[1], failed]
