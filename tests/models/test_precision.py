"""What a precision means on a device, and where it has no fast path."""

from __future__ import annotations

import pytest
import torch

from cosmos_ssl.models import precision
from cosmos_ssl.models.precision import DTYPES, coarse_products, has_fast_path, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "device", "meant"),
    [("auto", CPU, "fp32"), ("auto", CUDA, "amp_fp16"), ("amp_bf16", CPU, "amp_bf16"), ("fp32", CUDA, "fp32")],
)
def test_auto_is_what_the_device_computes_well_in(name: str, device: torch.device, meant: str) -> None:
    assert resolve_precision(name, device) == meant and meant in DTYPES


@pytest.mark.parametrize(("times", "fast"), [(0.6, True), (2.0, True), (4.5, False), (13.0, False)])
def test_a_cpu_is_tried(monkeypatch: pytest.MonkeyPatch, times: float, fast: bool) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda dtype: 1.0 if dtype == torch.float32 else times)
    assert [has_fast_path(name, CPU) for name in DTYPES] == [True, fast, fast]


def test_products_are_coarse_where_all_else_is() -> None:
    matmul = torch.backends.cuda.matmul
    for device, dtype, coarse in ((CPU, torch.bfloat16, False), (CUDA, torch.float16, True), (CUDA, None, False)):
        with coarse_products(device, dtype):
            assert matmul.allow_tf32 == coarse
        assert not matmul.allow_tf32


def test_a_trial_takes_milliseconds() -> None:
    assert has_fast_path("fp32", CPU) and 0 < precision._seconds(torch.float32) < 60


def test_a_card_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert [has_fast_path(name, CUDA) for name in DTYPES] == [True, False, True]
