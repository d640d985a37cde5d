"""What a counted step would take on a card, by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from cosmos_ssl.cost.card_step import CardStep
from cosmos_ssl.cost.cards import KERNEL_SECONDS, LAUNCH_SECONDS, LINKS, MEMORY, PRODUCTS, estimate
from cosmos_ssl.cost.count import Found, Kernel
from cosmos_ssl.engine.cards import CARDS, USABLE

H100 = CARDS["h100"]
GIB = 2**30


def kernel(stage: str, **given: int | str) -> Kernel:
    """One operation; ``given`` is what it does."""
    plain = {
        "name": "x",
        "launches": 1,
        "bytes": 0,
        "flops": 0,
        "precision": "half",
        "sent": 0,
        "span": 0,
        "carried": 0,
    }
    return Kernel(stage=stage, **plain | given)  # type: ignore[arg-type]


def step(kernels: dict[Kernel, int], ranks: int = 1) -> CardStep:
    """A step of 64 samples that keeps 1 GiB, and 1 GiB a sample at its peak."""
    found = Found(kernels=Counter(kernels), peaks=Counter({"backward": 65 * GIB}))
    about = {"samples": 64, "rank": 0, "ranks": ranks, "precision": "amp_bf16", "attention": "sdpa"}
    return CardStep(**about, found=found, state=GIB, per_sample=GIB)  # type: ignore[arg-type]


def test_an_operation_takes_the_longest_of_products_bytes_and_launches() -> None:
    product, rows, nothing = 989e12 * PRODUCTS, 3.35e12 * MEMORY, int(1e12)
    found = estimate(
        step(
            {
                kernel("losses", flops=int(product), bytes=nothing): 1,
                kernel("losses", flops=int(product * 67 / 989), precision="float"): 1,
                kernel("backward", flops=int(product / 4), bytes=int(rows)): 2,
                kernel("clip", launches=3, bytes=8): 10,
                kernel("augment", bytes=1, carried=int(64e9 * LINKS)): 1,
            }
        ),
        H100,
    )
    assert {stage.name: stage.ms for stage in found.stages} == pytest.approx(
        {"augment": 1000, "losses": 2000, "backward": 2000, "clip": 30 * KERNEL_SECONDS * 1e3}
    )
    assert found.launches == 35 and found.step_ms == pytest.approx(5000 + 30 * KERNEL_SECONDS * 1e3)
    assert found.samples_per_s == pytest.approx(64e3 / found.step_ms)
    assert found.mfu == pytest.approx((1.5 + 67 / 989) * PRODUCTS * 1e3 / found.step_ms)
    assert found.micro_batch == int(USABLE * 79.1) - 1  # a GiB each beside the one that is kept


def test_a_batch_is_copied_beside_the_step() -> None:
    copy = kernel("copy to the device", bytes=1, carried=int(64e9 * LINKS))
    product = kernel("losses", flops=int(989e12 * PRODUCTS))
    assert estimate(step({copy: 1, product: 2}), H100).step_ms == pytest.approx(2000)
    assert estimate(step({copy: 3, product: 2}), H100).step_ms == pytest.approx(3000)


def test_the_host_launches_one_kernel_after_the_other() -> None:
    found = estimate(step({kernel("clip"): 1000}), H100)
    assert found.step_ms == found.host_ms == pytest.approx(1000 * LAUNCH_SECONDS * 1e3)


@pytest.mark.parametrize(("ranks", "rate"), [(8, 450), (64, 50)])
def test_collectives_run_beside_the_backward_pass_alone(ranks: int, rate: float) -> None:
    sent = int(rate * LINKS * 1e9)
    busy = kernel("backward", bytes=int(3.35e12 * MEMORY))
    given = {"sent": sent, "span": ranks}
    found = estimate(step({busy: 3, kernel("backward", **given): 2, kernel("losses", **given): 1}, ranks), H100)
    assert {stage.name: stage.ms for stage in found.stages} == pytest.approx(
        {"losses": 1000, "backward": 3000}, rel=1e-5
    )
    assert found.sent_gigabytes == pytest.approx(3 * rate * LINKS)
