"""What a person sees of a run: lines, a progress bar on a terminal, a table at the end."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from cosmos_ssl.engine.cards import card_of
from cosmos_ssl.errors import printable
from cosmos_ssl.functional.collective_time import collective_time
from cosmos_ssl.functional.products import Products

log = logging.getLogger(__name__)

DELAY_VARIABLE = "COSMOS_SIGNAL_DELAY_S"
"""Set by what starts a job that gets a signal so many seconds before its end."""

_SHARE = 0.7
_SLOW = 0.1


class _ConsoleHandler(logging.Handler):
    """Log records as plain lines above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console
        self.addFilter(lambda record: not getattr(record, "file_only", False))

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record))  # keys of samples and names of shards are others' words
        line = text if record.levelno < logging.WARNING else f"warning: {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Watch:
    """Shows a run of ``total_steps`` on ``console`` from the start to the end of ``showing``."""

    def __init__(
        self, console: Console, total_steps: int, steps_per_epoch: int, save_seconds: Callable[[], float] = lambda: 0.0
    ) -> None:
        """``save_seconds``: how long a save takes."""
        self._save_seconds = save_seconds
        self._delay = float(os.environ.get(DELAY_VARIABLE, "inf"))
        self.console = console
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._seconds_a_step: float | None = None

    @contextmanager
    def showing(self, step: int) -> Iterator[None]:
        """Draw the bar, on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=self.console, refresh_per_second=4) as self._progress:
            self._task = self._progress.add_task("", total=self.total_steps, completed=step)
            yield
        self._progress = None

    def stepped(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def logged(self, step: int, row: Mapping[str, float], seconds_a_step: float) -> None:
        """Show a logged step: beside the bar, or as a line; warn, once, where a signal would come too late for a step
        and a save.
        """
        needed = seconds_a_step + self._save_seconds()
        if needed > _SHARE * self._delay:
            log.warning(
                "a step and a save take %.0f s, over %.0f %% of the %.0f s between the signal and the end of the job: "
                "raise the profile's signal_delay_s",
                *(needed, 100 * _SHARE, self._delay),
            )
            self._delay = float("inf")
        old = self._seconds_a_step
        self._seconds_a_step = seconds_a_step if old is None else 0.7 * old + 0.3 * seconds_a_step
        text = printable(describe(row, (self.total_steps - step) * self._seconds_a_step))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=text)
        else:
            width = len(f"{self.total_steps:,}")
            self.console.print(
                f"step {step:>{width},} of {self.total_steps:,}  {text}", markup=False, highlight=False, soft_wrap=True
            )

    def table(self, title: str, metrics: Mapping[str, float], roles: Iterable[str] = ("student", "teacher")) -> None:
        """Show the final evaluation: a row a metric, a column a role."""
        known, there = tuple(roles), set[str]()
        rows: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            evaluator, _, rest = name.partition("/")
            role, _, metric = rest.partition("/")
            if role in known and metric:
                there.add(role)
                rows.setdefault(f"{evaluator} {metric}", {})[role] = value
        if not rows:
            return
        shown = [role for role in known if role in there]
        table = Table(title=printable(title), title_justify="left")
        table.add_column("metric")
        for role in shown:
            table.add_column(printable(role), justify="right")
        for name, row in rows.items():
            table.add_row(printable(name), *(f"{row[role]:.4g}" if role in row else "" for role in shown))
        self.console.print(table)


def describe(row: Mapping[str, float], seconds_left: float) -> str:
    """One line of a logged step."""
    terms = "  ".join(
        f"{name.partition('/')[2]} {value:.3f}"
        for name, value in row.items()
        if name.count("/") == 1 and name[:5] == "loss/"
    )
    slow = (
        f"  slowest rank {row['slowest_rank']} (+{row['slowest_rank_lag']:.0%})"
        if row.get("slowest_rank_lag", 0) >= _SLOW
        else ""
    )
    shown = (("mfu", "mfu {:.0%}"), ("memory", "memory {:.1f} GiB"), ("gpu_wait", "gpu wait {:.0%}"))
    device = "".join(f"{words.format(row[name])}  " for name, words in shown if name in row)
    return (
        f"epoch {row['epoch']:.2f}  loss {row['loss']:.3f}  {terms}  lr {row['lr']:.2e}  "
        f"{row['samples_per_second']:,.0f} samples/s  "
        f"{device}data wait {row['data_wait']:.0%}{slow}  left {timedelta(seconds=round(seconds_left))}"
    )


@contextmanager
def lines(console: Console) -> Iterator[None]:
    """Show on ``console`` what the project logs, from the level of information on."""
    logger = logging.getLogger("cosmos_ssl")
    handler, level, propagate = _ConsoleHandler(console), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a root handler would print every line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class Clock:
    """Since the last reading: samples a second, the share of time spent waiting for data, and the time of this rank's
    own work. Of a CUDA device also ``gpu_wait``, the share of time that it had nothing to do between two steps,
    ``memory``, the most GiB in use at once, and ``mfu``, the share of its peak that the products of a step come to, 0
    where either is not known. The second step is counted for all.
    """

    def __init__(self, device: torch.device | None = None, precision: str = "fp32") -> None:
        """``precision``: the run's, whose peak counts."""
        self.device = device or torch.device("cpu")
        self.on_cuda = self.device.type == "cuda"
        card = card_of(torch.cuda.get_device_name(self.device)) if self.on_cuda else None
        self._peak = card and card.peak(precision)
        self._flops: int | None = None
        """Of a step; None before the first."""
        self._ended: torch.cuda.Event | None = None
        self._gap: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._for_others = -collective_time.total()
        self._waited = 0.0
        self._idle = 0.0
        self._paused = 0.0
        self._steps = 0

    def waited(self, seconds: float) -> None:
        """The loop waited so long for a batch, and goes on with a step."""
        self._waited += seconds
        self._steps += 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step, from what it brings to the device on."""
        if not self.on_cuda:
            yield
            return
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        self._add_gap()
        if self._ended is not None:
            self._gap = self._ended, began
        counting = self._peak is not None and self._flops == 0
        with Products() if counting else nullcontext() as products:
            yield
        self._flops = products.flops if products else self._flops or 0
        ended.record()
        self._ended = ended

    def _add_gap(self) -> None:
        """Add the time between the last two steps; the device has come to the second of them long ago."""
        if self._gap is not None:
            ended, began = self._gap
            began.synchronize()
            self._idle += ended.elapsed_time(began) / 1000
            self._gap = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that belongs to no step (an evaluation)."""
        start, waited = time.perf_counter(), collective_time.total()
        yield
        self._paused += time.perf_counter() - start
        self._for_others -= collective_time.total() - waited
        self._ended = None

    def read(self, batch_size: int) -> tuple[dict[str, float], float, float]:
        """The numbers of a row, seconds a step, and seconds of this rank's own work; then start anew."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        rates = {"samples_per_second": self._steps * batch_size / seconds, "data_wait": self._waited / seconds}
        if self.on_cuda:
            self._add_gap()
            rates |= {
                "gpu_wait": self._idle / seconds,
                "memory": torch.cuda.max_memory_allocated(self.device) / 2**30,
                "mfu": (self._flops or 0) * self._steps / seconds / self._peak if self._peak else 0.0,
            }
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds_a_step = seconds / max(self._steps, 1)
        own = max(seconds - self._for_others - collective_time.total(), 1e-9)
        self._restart()
        return rates, seconds_a_step, own
