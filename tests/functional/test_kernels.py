"""Sets of kernels: tried once, told once, switched off in one line; the log and ``info`` say which run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cosmos_ssl.functional.kernels import Kernels, explain_kernels, kernels_report, tried
from cosmos_ssl.models import fused
from cosmos_ssl.models.transformer import Blocks, lay_out
from cosmos_ssl_plugins.augmenters import photometric

CARD = torch.device("cuda", 0)
TESTS = Path(__file__).resolve().parents[1]
INTERPRETED = [TESTS / "models" / "test_fused.py", TESTS / "plugins" / "augmenters" / "test_fused.py"]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other sets, and a PyTorch that is built for CUDA."""
    monkeypatch.setattr(Kernels, "known", [])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)


@pytest.mark.usefixtures("built")
def test_a_set_is_tried_once_and_told_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def broken(*mode: Any) -> None:
        asked.append(mode)
        raise RuntimeError("no compiler\nat all")

    with caplog.at_level(logging.WARNING, "cosmos_ssl"):
        sums, products = Kernels("sums", broken), Kernels("products", lambda *_: None, (torch.float16,))
        assert [sums.fault(CARD, dtype) for dtype in (torch.uint8, torch.float16)] == ["no compiler"] * 2
        assert products.fault(CARD, torch.float16) is None
        said = explain_kernels("auto", CARD, torch.float32)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        assert explain_kernels("auto", torch.device("cuda"), torch.float16).endswith("products: fused")
        assert kernels_report() == {"sums": "no compiler", "products": "available"}
    assert said == "sums: plain (no compiler); products: plain (not for float32)"
    assert asked == [(CARD, torch.uint8)]
    assert caplog.messages == ["kernels of sums do not run on cuda:0, PyTorch's own do: no compiler"]
    assert explain_kernels("plain", CARD, torch.float16) == "plain"
    assert explain_kernels("auto", torch.device("cpu"), torch.float16) == "plain (auto on cpu)"


def test_a_trial_knows_nothing_of_what_is_around_it() -> None:
    """Inside of a checkpointed block, whose hooks hold what is kept, and without gradients."""

    def trial() -> None:
        x = torch.ones(2, requires_grad=True)
        (x.exp() * x).sum().backward()
        assert x.grad is not None

    def block(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found.append(tried(trial, "cpu"))
        return x.exp()

    found: list[str | None] = []
    checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert found == [None, None]


def test_plain_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the transformer and of the photometric work, by the one option."""

    def never(*_: Any) -> bool:
        raise AssertionError("kernels were asked for")

    monkeypatch.setattr(fused, "usable", never)
    monkeypatch.setattr(photometric.KERNELS, "fault", never)
    layout = lay_out(np.array([2, 1]), np.ones(3, bool))
    assert Blocks(1, 8, 2, kernels="plain")(torch.zeros(3, 8), layout).shape == (3, 8)
    with pytest.raises(AssertionError, match="were asked for"):
        Blocks(1, 8, 2)(torch.zeros(3, 8), layout)
    pixels: Any = SimpleNamespace(is_cuda=True, device=CARD, dtype=torch.uint8)
    assert not photometric._fusible(pixels, "plain")
    with pytest.raises(AssertionError, match="were asked for"):
        photometric._fusible(pixels, "auto")


def test_interpreted_kernels_are_the_plain_code() -> None:
    """As the ``interpreted`` of each says; one process, since Triton and all that it needs take seconds to load."""
    code = (
        f"import runpy; [runpy.run_path(path, run_name='__main__') for path in {[str(path) for path in INTERPRETED]}]"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
