"""The clock of a run's rows, with a stand-in for a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from cosmos_ssl.engine.cards import CARDS, card_of
from cosmos_ssl.engine.watch import Clock, describe

GIB = 2**30


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.device]:
    """A device of this name, on which an event is reached as soon as it is recorded."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 1000 * (other.at - self.at)

    def make(name: str) -> torch.device:
        peaks = [3 * GIB]
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[-1])
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.append(GIB))
        return torch.device("cuda", 0)

    return make


def run(clock: Clock, steps: int, between: float = 0.0) -> None:
    """Steps of one product, 2 * 4 * 8 * 16 FLOPs, with so many seconds before each."""
    for _ in range(steps):
        time.sleep(between)
        clock.waited(0.0)
        with clock.step():
            torch.ones(4, 8) @ torch.ones(8, 16)


def test_what_a_row_says_of_a_card(device: Callable[..., torch.device]) -> None:
    clock = Clock(device("NVIDIA H100 80GB HBM3"), "amp_bf16")
    run(clock, 1)
    assert clock.read(4)[0].items() >= {"mfu": 0.0, "gpu_wait": 0.0, "memory": 3.0}.items()
    run(clock, 3, between=0.02)
    with clock.paused():
        time.sleep(0.05)  # of an evaluation nobody waits
    run(clock, 1)
    rates, seconds_a_step, _ = clock.read(4)
    assert rates["mfu"] == pytest.approx(2 * 4 * 8 * 16 / seconds_a_step / 989e12)
    assert rates["memory"] == 1.0 and 0.06 <= rates["gpu_wait"] * 4 * seconds_a_step < 4 * seconds_a_step
    row = {"epoch": 1, "loss": 1, "lr": 1, **rates, "mfu": 0.314, "gpu_wait": 0.02, "data_wait": 0.01}
    assert "samples/s  mfu 31%  memory 1.0 GiB  gpu wait 2%  data wait 1%" in describe(row, 0)
    run(clock, 1)
    assert clock.read(4)[0]["mfu"] > 0  # counted once for all


def test_where_less_is_known(device: Callable[..., torch.device]) -> None:
    clock = Clock()
    run(clock, 2)
    assert set(clock.read(4)[0]) == {"samples_per_second", "data_wait"}
    clock = Clock(device("NVIDIA RTX A6000"))
    run(clock, 3)
    assert clock.read(4)[0]["mfu"] == 0


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_cards_are_known_by_cudas_names(name: str, card: str | None) -> None:
    assert card_of(name) == (card and CARDS[card])


def test_the_peak_is_that_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CARDS["h100"].peak("amp_fp16") == 989e12 and CARDS["h100"].peak("fp32") == 67e12
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    assert CARDS["h100"].peak("fp32") == 494e12
