"""What a counted step would take on a named card: an estimate, by its peak rates and the share of them that is reached.

Each operation takes as long as its products, its bytes, or its launches, whichever is longest; operations run one after
the other, collectives of weights and gradients beside the passes, and the copy of a batch beside the step before. The
host launches one kernel after the other, too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from cosmos_ssl.cost.card_step import COPY, STAGES, CardStep
from cosmos_ssl.cost.count import Kernel
from cosmos_ssl.engine.cards import USABLE, Card

PRODUCTS = 0.58
"""Share of the peak that large products in 16 bits reach: 575 of 989 TFLOP/s on an H100."""
MEMORY = 0.78
"""Share of the bandwidth that kernels reach: 2.6 of 3.35 TB/s on an H100."""
LINKS = 0.75
"""Share of the links' rate that collectives and copies reach."""
KERNEL_SECONDS = 2e-6
"""What a kernel takes that does nothing."""
LAUNCH_SECONDS = 6e-6
"""What PyTorch takes on the host for a launch."""
NODE = 8
"""Cards of a node; with more ranks, collectives run at the network's rate."""
_BESIDE = ("teacher forward", "student forward", "backward")
"""Stages that collectives run beside: of gradients, and of the weights that the next block takes."""
LOADER_SECONDS = 3.9e-3
"""Of one core for a sample's eight views and captions of COSMOS (tools/bench_data.py)."""
ASSUMPTIONS = (
    f"Assumed: products reach {PRODUCTS:.0%} of the card's peak, memory {MEMORY:.0%}; an operation takes the longer of",
    f"both, and at least {1e6 * KERNEL_SECONDS:g} us a kernel, one after the other; a launch takes the host "
    f"{1e6 * LAUNCH_SECONDS:g} us;",
    f"collectives reach {LINKS:.0%} of NVLink within {NODE} ranks, of the network beyond, beside the passes;",
    "a batch is copied beside the step before;",
    f"tensors fill {USABLE:.0%} of the memory. MFU is of the products that run. A core of the loader makes the",
    "eight views of a sample of COSMOS, and its tokens.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a stage of the step takes."""

    name: str
    launches: int
    gigabytes: float
    teraflops: float
    peak_gib: float
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a step takes on a card."""

    launches: int
    gigabytes: float
    """Read and written."""
    teraflops: float
    peak_gib: float
    """With weights, moments and gradients."""
    host_waits: int
    pageable_copies: int
    step_ms: float
    host_ms: float
    """What the host needs to launch it all: the least that a step takes."""
    samples_per_s: float
    """Of one card."""
    mfu: float
    """Share of the card's peak in 16 bits that the counted products come to."""
    sent_gigabytes: float
    """To other ranks."""
    micro_batch: int
    """The most samples whose step fits into the card's memory; 0 where none does."""
    loader_cores: float
    """For each card."""
    stages: tuple[Stage, ...]


def estimate(step: CardStep, card: Card) -> Estimate:
    """Work out what ``step`` takes on ``card``."""
    kernels: dict[str, list[tuple[Kernel, int]]] = defaultdict(list)
    for kernel, count in step.found.kernels.items():
        kernels[kernel.stage].append((kernel, count))
    stages = []
    for name in (name for name in STAGES if kernels[name]):
        computing = sum(count * _seconds(kernel, card) for kernel, count in kernels[name])
        sending = sum(count * _sending(kernel, card) for kernel, count in kernels[name])
        stages.append(
            Stage(
                name=name,
                launches=sum(count * kernel.launches for kernel, count in kernels[name]),
                gigabytes=sum(count * kernel.bytes for kernel, count in kernels[name]) / 1e9,
                teraflops=sum(count * kernel.flops for kernel, count in kernels[name]) / 1e12,
                peak_gib=step.found.peaks[name] / 2**30,
                ms=1e3 * (max(computing, sending) if name in _BESIDE else computing + sending),
            )
        )
    launches, teraflops = sum(stage.launches for stage in stages), sum(stage.teraflops for stage in stages)
    host_ms = launches * LAUNCH_SECONDS * 1e3
    in_turn = sum(stage.ms for stage in stages if stage.name != COPY)
    step_ms = max(host_ms, in_turn, *(stage.ms for stage in stages))
    rate = step.samples / step_ms * 1e3
    room = USABLE * card.gib * 2**30 - step.peak
    return Estimate(
        launches=launches,
        gigabytes=sum(stage.gigabytes for stage in stages),
        teraflops=teraflops,
        peak_gib=step.peak / 2**30,
        host_waits=step.found.waits.total(),
        pageable_copies=step.found.pageable.total(),
        step_ms=step_ms,
        host_ms=host_ms,
        samples_per_s=rate,
        mfu=teraflops / (step_ms / 1e3 * card.half),
        sent_gigabytes=sum(count * kernel.sent for kernel, count in step.found.kernels.items()) / 1e9,
        micro_batch=max(0, int(step.samples + room / step.per_sample)),
        loader_cores=rate * LOADER_SECONDS,
        stages=tuple(stages),
    )


def _sending(kernel: Kernel, card: Card) -> float:
    """Return what a collective takes on its links: ranks of a node are neighbours."""
    return kernel.sent / ((card.link if kernel.span <= NODE else card.network) * LINKS * 1e9)


def _seconds(kernel: Kernel, card: Card) -> float:
    """Return what an operation takes on the device."""
    peak = {"half": card.half, "tf32": card.tf32, "float": card.single}[kernel.precision] * 1e12
    moving = max(kernel.bytes / (card.memory * MEMORY * 1e12), kernel.carried / (card.host * LINKS * 1e9))
    return max(kernel.flops / (peak * PRODUCTS), moving, kernel.launches * KERNEL_SECONDS)
