"""What the steps of a run spend their time on: a Chrome trace of a few of them, the shares of a few kinds of work, and
the table of their operators.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from cosmos_ssl.data.loader import LoadedBatch

Paused = Callable[[], AbstractContextManager[None]]

log = logging.getLogger(__name__)

_SKIPPED = 4
"""Steps before the window: they fill caches and the allocator's pools, and the last of them warms up the profiler."""

_KINDS = {
    "attention": re.compile(r"attention|flash|fmha|attn|sdpa", re.IGNORECASE),
    "products": re.compile(
        r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|conv(?!ert)|[dw]grad|aten::(add|badd)?b?m[mv]\b|aten::dot\b|triton_tem",
        re.IGNORECASE,
    ),
}
"""Kinds of work by the names of CUDA kernels and of the CPU's operators. The first that fits is taken."""
_REST = "elementwise and the rest"
_BESIDE = {
    "copies": re.compile(r"memcpy|memset|copy|aten::(cat|clone|contiguous)\b", re.IGNORECASE),
    "communication": re.compile(r"nccl|gloo|c10d", re.IGNORECASE),
}
_IDLE = "idle"


def traced(
    batches: Generator[LoadedBatch], steps: int, left: int, device: torch.device, path: Path, paused: Paused
) -> Generator[LoadedBatch]:
    """Hand on the ``left`` batches, one a step, and record ``steps`` of these steps, near the start; fewer where the
    run is shorter.

    Writes ``path``, a gzipped Chrome trace (for https://ui.perfetto.dev), and the operators by time beside it,
    ``.txt``; nothing when closed before the window ends, since whoever closes wants to save and leave. ``paused`` is
    for work of no step.
    """
    with closing(batches):
        if steps:
            yield from _recorded(batches, steps, left, device, path, paused)
        yield from batches


def _recorded(
    batches: Generator[LoadedBatch], steps: int, left: int, device: torch.device, path: Path, paused: Paused
) -> Generator[LoadedBatch]:
    """The batches to the end of the window, which is then written."""
    skipped = max(1, min(_SKIPPED, left - steps))
    steps = min(steps, left - skipped)
    if steps < 1:
        log.info("no trace: training.trace_steps leaves out the first step, and there are no more")
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # what the profiler prints on its own tears a progress bar
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    window = schedule(wait=skipped - 1, warmup=1, active=steps, repeat=1)
    try:
        with profile(activities=activities, schedule=window, record_shapes=True) as profiler:
            for _ in range(skipped + steps):
                with record_function("data wait"):
                    batch = next(batches)
                yield batch
                with paused():
                    profiler.step()
    except GeneratorExit:
        log.info("no trace: the run was left before its traced steps were done")
        raise
    with paused():
        _write(profiler, on_cuda, path, f"{steps:,} steps, up to step {batch.step + 1:,}")


def _write(profiler: profile, on_cuda: bool, path: Path, which: str) -> None:
    """Write trace and table; a run survives a disk that cannot take them."""
    start = time.monotonic()
    operators = profiler.key_averages()
    if on_cuda and not any(operator.self_device_time_total for operator in operators):
        log.warning(
            "the trace holds no kernels: the profiler cannot observe the GPU. With KINETO_LOG_LEVEL=4 it says why"
        )
    shares = f"time: {_summary(profiler, on_cuda)}"
    table = operators.table(
        sort_by=f"self_{'device' if on_cuda else 'cpu'}_time_total", row_limit=60, max_name_column_width=80
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        path.with_name(path.name.replace(".json.gz", ".txt")).write_text(
            f"{which}\n{shares}\n{table}\n", encoding="utf-8"
        )
    except OSError as error:
        log.warning("no trace: %s cannot be written: %s", path, error.strerror or error)
        return
    log.info(
        "traced %s: %s, for https://ui.perfetto.dev, and .txt beside it (%.1f s); %s",
        *(which, path, time.monotonic() - start, shares),
    )


def _summary(profiler: profile, on_cuda: bool) -> str:
    """Shares of the traced steps' time, of the device's kernels or of the host's operators."""
    device = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = list(profiler.events() or ())
    steps = [event.time_range for event in events if event.name.startswith("ProfilerStep")]
    work = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == device and not event.is_user_annotation
    ]
    start, end = min(step.start for step in steps), max(step.end for step in steps)
    found = shares_of(work, start, max([end, *(last for _, _, last in work if on_cuda)]))
    return ", ".join(f"{kind} {share:.0%}" for kind, share in found.items())


def shares_of(work: Iterable[tuple[str, float, float]], start: float, end: float) -> dict[str, float]:
    """The share of the time from ``start`` to ``end`` that each kind of work has, and how much nothing does (idle).

    ``work``: name, start and end of kernels or operators. Where several run at once, or one within another, the time is
    that of the kind that comes first: communication has what hides behind nothing.
    """
    kinds, known = [*_KINDS, _REST, *_BESIDE], _KINDS | _BESIDE
    changes: list[tuple[float, int, int]] = []
    for name, first, last in work:
        kind = next((kind for kind, names in known.items() if names.search(name)), _REST)
        changes += [(max(first, start), 1, kinds.index(kind)), (min(last, end), -1, kinds.index(kind))]
    found, running, now = dict.fromkeys([*kinds, _IDLE], 0.0), [0] * len(kinds), start
    for at, change, number in [*sorted(changes), (end, 0, 0)]:
        whose = next((kind for kind, count in zip(kinds, running, strict=True) if count), _IDLE)
        found[whose] += max(0.0, at - now) / (end - start)
        now = max(now, at)
        running[number] += change
    return found
