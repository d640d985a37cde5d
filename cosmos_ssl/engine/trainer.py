"""Training: a run is started or resumed, loops over updates, logs, saves, evaluates, and finishes."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor

from cosmos_ssl.api import Progress
from cosmos_ssl.config import Config
from cosmos_ssl.config.ranks import check_ranks
from cosmos_ssl.data.loader import LoadedBatch, Loader
from cosmos_ssl.engine.assembly import Assembly, make_order, total_steps
from cosmos_ssl.engine.background import CheckpointWriter
from cosmos_ssl.engine.checkpoint import latest_checkpoint
from cosmos_ssl.engine.distributed import (
    World,
    as_run_errors,
    be_deterministic,
    be_impatient,
    dump_flights,
    keep_freed_memory,
    pick_device,
)
from cosmos_ssl.engine.evaluate import due, evaluate, summary
from cosmos_ssl.engine.exchange import check_replicas, share_start, spread
from cosmos_ssl.engine.fork import Fork, note_fork, plan_fork, refusing, told_fork
from cosmos_ssl.engine.metrics import JsonLines, PngFiles, TensorBoard, Writer, Writers, cut_rows, metrics_at
from cosmos_ssl.engine.run_folder import RunFolder, versions
from cosmos_ssl.engine.signals import AHEAD, Interrupted, Signals
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.engine.step import News, Step, Update
from cosmos_ssl.engine.trace import traced
from cosmos_ssl.engine.watch import Clock, Watch, lines
from cosmos_ssl.engine.watchdog import Watchdog
from cosmos_ssl.errors import CosmosError, StorageError, TrainingError, listed
from cosmos_ssl.functional import gather_objects
from cosmos_ssl.identity import Identity
from cosmos_ssl.models.attention import explain_backend
from cosmos_ssl.models.precision import DTYPES, has_fast_path, resolve_precision
from cosmos_ssl.models.transformer import head_widths

log = logging.getLogger(__name__)


class Trainer:
    """Trains an assembly into a run folder; called again on the same folder, it goes on where it stood."""

    def __init__(
        self,
        assembly: Assembly,
        config: Config,
        run_dir: Path | str,
        *,
        device: torch.device | None = None,
        console: Console | None = None,
        writers: Sequence[Writer] = (),
        signals: Signals | None = None,
    ) -> None:
        """``device``: default by ``training.device``. ``writers`` receive the metrics too. Raises UserError.

        ``signals`` are watched already; by default they are from the start of ``train`` on.
        """
        self.assembly = assembly
        self.config = config
        self.world = World()
        self.folder = RunFolder(Path(run_dir), self.world.rank)
        self.device = device or pick_device(config.training.device)
        if config.training.deterministic:
            be_deterministic()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.console = console or Console(quiet=not self.world.first)
        self.writers = writers
        self.signals = signals or Signals(at_once=True)
        self._watching = signals is not None
        check_ranks(config, self.world.size)
        assert assembly.dataset is not None, "a model built to be read, not trained"
        self.dataset = assembly.dataset
        self.order = make_order(config, self.dataset.shard_sizes)
        self.loader = Loader(
            self.dataset,
            self.order,
            image=assembly.augmenters.get("image"),
            text=assembly.augmenters.get("text"),
            tokenizer=assembly.tokenizer,
            workers=config.loader.workers,
            rank=self.world.rank,
            world=self.world.size,
            prefetch=config.loader.prefetch,
            pin_memory=self.device.type == "cuda",
            background=config.model.background,
            total_steps=total_steps(config, self.order),
        )
        self.steps_per_epoch = self.order.steps_per_epoch
        self.total_steps = total_steps(config, self.order)
        self.run: Run | None = None
        """The run under way."""

    @cached_property
    def identity(self) -> Identity:
        """What makes this run this run; read from config, data and files, on the first rank alone."""
        return Identity.of(self.config, self.dataset.identity(), self.assembly.places())

    def train(self) -> dict[str, float]:
        """Train to the end and return the final metrics.

        Raises UserError for a run folder that is another's or in use, Interrupted after a signal (saved),
        TrainingError where going on makes no sense, StorageError where starting again may help.
        """
        with ExitStack() as stack:
            stack.enter_context(lines(self.console))
            if not self._watching:
                stack.enter_context(self.signals)
            self.world.run_on_first(lambda: stack.enter_context(self.folder.locked()))
            stack.enter_context(as_run_errors())
            metrics = self.world.run_on_first(self._finished)
            if metrics is not None:
                log.info("run %s is finished (step %s)", self.folder.path, f"{self.total_steps:,}")
                return metrics
            with self.folder.logged():
                try:
                    with ExitStack() as inner:
                        self.run = Run(self, inner)
                        return self.run.to_end()
                except BaseException as error:
                    unforeseen = not isinstance(error, CosmosError) or error.__cause__ or hasattr(error, "__notes__")
                    told = error or type(error).__name__
                    log.info("the run ended: %s", told, exc_info=bool(unforeseen), extra={"file_only": True})
                    raise

    def _finished(self) -> dict[str, float] | None:
        """On the first rank: the final metrics where nothing is left to do. Raises UserError for another's folder."""
        self.folder.check_identity(self.identity, accept_data=self.config.loader.changed_data == "accept")
        result = self.folder.result()
        if result is None or result["step"] != self.total_steps:
            return None
        self.folder.identify(finished=True)
        return dict(result["metrics"])


class Run:
    """A run under way: what it consists of while it trains, as new or as the newest sound checkpoint left it."""

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        """Start or resume; ``stack`` closes what was opened. Raises UserError, CheckpointError."""
        self.trainer, self.assembly, self.config = trainer, trainer.assembly, trainer.config
        self.world, self.folder, self.signals = trainer.world, trainer.folder, trainer.signals
        self.steps_per_epoch, self.total_steps = trainer.steps_per_epoch, trainer.total_steps
        newest = self.world.run_on_first(lambda: latest_checkpoint(self.folder.path))
        precision = resolve_precision(self.world.run_on_first(self.folder.begun_in), trainer.device)
        dtype, widths = DTYPES[precision] or torch.float32, head_widths(self.assembly.model)
        told = [explain_backend(self.config.training.attention, trainer.device, dtype, width) for width in widths]
        self.attention = "; ".join(dict.fromkeys(told))  # refused now rather than within the first step
        self.state = RunState(self.assembly, self.config, trainer.device, precision)
        self.state.model.train()
        self.step = Step(self.assembly, self.state, self.config.training)
        with refusing(self.folder):
            fork = self.world.run_on_first(self._fork) if newest is None else None
            source = newest if fork is None else fork.checkpoint
            saved = self.state.restore(source) if source is not None else None
        if source is None:
            share_start(self.state.replicas)
        if fork is not None:
            self.state.step = fork.step
        if self.world.first:
            cut_rows(self.folder.metrics, self.state.step)
        self.evaluated = self._already_evaluated()
        self._announce(saved, fork)
        self.writers = Writers(list(self._make_writers()) if self.world.first else [])
        stack.callback(self.writers.close)
        self.checkpoints = CheckpointWriter(
            self.folder.path,
            self.config.checkpoints,
            self.steps_per_epoch,
            self.total_steps,
            sound=None if newest is None else self.state.step,
            writes=self.world.first,
        )
        stack.callback(self.checkpoints.close)
        self.world.run_on_first(lambda: self._settle(fork))
        trainer.loader.check_limits()
        self.signals.at_once = False
        self.watchdog = stack.enter_context(
            Watchdog(self.config.training.timeout_minutes, self.folder.log, self._where)
        )
        self.watch = Watch(trainer.console, self.total_steps, self.steps_per_epoch, lambda: self.checkpoints.seconds)
        stack.enter_context(self.watch.showing(self.state.step))
        self.clock = Clock()
        self.between_steps = True
        """Whether what an error leaves behind can be saved."""

    def to_end(self) -> dict[str, float]:
        """Loop and finish; the final metrics. What ends the run between two steps finds it saved."""
        try:
            self.evaluate()  # what a resumed run still owes
            self.loop()
        except (Interrupted, TrainingError):
            raise
        except Exception:
            if self.between_steps:
                self.save_now()
            raise
        self.save_together()
        return self.finish()

    # ------------------------------------------------------------------ the loop

    def loop(self) -> None:
        """Make the updates that are left; after each log, save and evaluate where it is due."""
        left = self.total_steps - self.state.step
        path, paused, first = self.folder.trace, self.clock.paused, self.state.step + 1
        batches = traced(self._batches(), self.config.training.trace_steps, left, self.state.device, path, paused)
        with closing(batches):  # whatever ends the loop, workers do not outlive it
            began = time.monotonic()
            for batch in batches:
                self.between_steps = False
                self.watchdog.alive()
                progress = Progress(
                    step=self.state.step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
                )
                update = self.step(batch.views.to(self.state.device), progress, lambda b=batch: self._news(b))  # type: ignore[misc]
                self.state.step += 1
                if self.state.step == first:
                    be_impatient()
                self._count(update.told.news, batch)
                self.between_steps = True
                self.signals.ahead = f"{AHEAD} (a step takes about {time.monotonic() - began:.0f} s)"
                self.log(update)
                self.save_if_due(update.told.news)
                if update.told.news.signal:
                    self._leave(update.told.news.signal, together=True)
                self.evaluate()
                began = time.monotonic()

    def _batches(self) -> Generator[LoadedBatch]:
        """The batches that are left, timing the wait for each."""
        start = time.perf_counter()
        for batch in self.trainer.loader.batches(self.state.step, self.total_steps):
            self.clock.waited(time.perf_counter() - start)
            yield batch
            start = time.perf_counter()

    def _news(self, batch: LoadedBatch) -> News:
        """Return what the other ranks must learn of this one."""
        signal = self.signals.received or 0
        due = self.checkpoints.due(self.state.step + 1)
        return News(signal=signal, bad_samples=len(batch.replaced), unsaved=self.checkpoints.fault, save=due)

    def _count(self, news: News, batch: LoadedBatch) -> None:
        """Count what all ranks have consumed. Raises TrainingError past the budget of bad samples."""
        replaced = gather_objects(batch.replaced) if news.bad_samples else []
        self.state.budget.add([item for theirs in replaced for item in theirs], self.config.training.batch_size)

    def _leave(self, signal: int, *, together: bool) -> NoReturn:
        """Save, and raise Interrupted; ``together`` where all ranks leave at this step."""
        # what started the ranks ends all when one leaves: not before the first has saved
        self.save_together() if together else self.save_now()
        cause = Interrupted(signal).cause
        raise Interrupted(signal, f"{cause}: saved {self._place()}. The same command goes on from there.") from None

    # ------------------------------------------------------------------ log, save, evaluate, finish

    def log(self, update: Update) -> None:
        """Write a row, every so many steps and at the last."""
        step = self.state.step
        self.watch.stepped(step)
        if step % self.config.logging.every_steps and step != self.total_steps:
            return
        rates, seconds_a_step, own_seconds = self.clock.read(self.config.training.batch_size)
        numbers: dict[str, Tensor | float] = {
            **update.result.logs,
            "lr": self.state.optimizer.lr,
            "grad_norm": update.norm,
            **{f"teacher/{name}": value for name, value in update.moved.items()},
            **spread(update.result.moments),
        }
        row = {"epoch": step / self.steps_per_epoch}
        row |= self.world.mean({n: x.item() if isinstance(x, Tensor) else x for n, x in numbers.items()})
        row |= dict(zip(rates, self.world.most(list(rates.values())), strict=True)) | self.world.slowest(own_seconds)
        row |= {"skipped_steps": self.state.counters.skipped, "bad_samples": self.state.budget.bad}
        if self.state.scaler is not None:
            row["loss_scale"] = self.state.scaler.get_scale()
        self.writers.scalars(step, row)
        self.watch.logged(step, row, seconds_a_step)

    def save_if_due(self, news: News) -> None:
        """Start writing a checkpoint where one is due; all ranks hear of one that failed.

        Raises TrainingError for one that was not finite, or not the same on all ranks, StorageError where one could not
        be written and that ends the run.
        """
        if news.unsaved:
            fault = self.world.run_on_first(self.checkpoints.take_fault)
            if isinstance(fault, TrainingError):
                raise fault
            if self.config.checkpoints.on_failure == "stop":
                raise StorageError(f"{fault} (checkpoints.on_failure: stop)")
            log.warning("%s; training goes on", fault)
        if news.save:
            check_replicas(self.state.replicas)
            if self.world.first:
                self._save()

    def _save(self) -> None:
        """Hand a snapshot to the writer."""
        self.writers.sync()
        identity = self.trainer.identity
        about = {
            "samples": self.state.step * self.config.training.batch_size,
            "epoch": self.state.step / self.steps_per_epoch,
            "ranks": self.world.size,
            "precision": self.state.precision,
            "identity": {"config": identity.digest(), "data": identity.data},
            "versions": versions(self.assembly.parts),
        }
        self.checkpoints.write(self.state.snapshot(about))

    def save_together(self) -> None:
        """Save where all ranks stand. Raises StorageError, TrainingError where they do not stand at the same."""
        check_replicas(self.state.replicas)
        self.world.run_on_first(self.save_now)

    def save_now(self) -> None:
        """Save where the run stands and wait for it, on the first rank. Raises StorageError."""
        if self.world.first:
            if not self.checkpoints.has(self.state.step):
                self._save()
            self.checkpoints.wait(self.state.step)

    def evaluate(self) -> None:
        """Run the evaluators that are due and have not run at this step. Raises Interrupted."""
        step = self.state.step
        for name in due(self.assembly.evaluators, step, self.steps_per_epoch, self.total_steps):
            if name in self.evaluated:
                continue
            start, ahead = time.monotonic(), self.signals.ahead
            self.signals.ahead = "the evaluation ends after the batch under way, then all is saved"
            with self.clock.paused():
                dtype = DTYPES[self.state.precision]
                try:
                    found = evaluate(name, self.assembly, self._alive, dtype, pictures=self.world.first)
                except Interrupted as error:
                    self._leave(error.number, together=False)
                self.writers.pictures(step, found.pictures)
                self.writers.scalars(step, {"epoch": step / self.steps_per_epoch, **found.metrics})
                self.writers.sync()
            self.signals.ahead = ahead
            seconds = time.monotonic() - start
            told = (name, f"{step:,}", self.state.precision, seconds, summary(found))
            log.info("%s after step %s (%s, %.1f s): %s", *told)
        self.evaluated = set()

    def _alive(self) -> None:
        """Called by an evaluation between its batches. Raises Interrupted."""
        self.watchdog.alive()
        self.signals.check()

    def finish(self) -> dict[str, float]:
        """Mark the run as finished and show its final table."""
        self.writers.sync()
        metrics = self.world.run_on_first(lambda: metrics_at(self.folder.metrics, self.state.step))
        if self.world.first:
            self.folder.finish(self.total_steps, metrics)
        self.watch.table(f"{self.config.name} after {self.total_steps:,} steps", metrics)
        log.info("finished %s", self._place())
        return metrics

    # ------------------------------------------------------------------ the start, for the constructor

    def _fork(self) -> Fork | None:
        """On the first rank: where to start, if the folder says that its run goes on from another. Raises UserError."""
        checkpoint = told_fork(self.folder)
        if checkpoint is None:
            return None
        return plan_fork(checkpoint, self.trainer.identity, self.config, self.trainer.dataset.shard_sizes)

    def _settle(self, fork: Fork | None) -> None:
        """On the first rank: make the folder this run's; what was taken over from another run is kept here too."""
        if fork is not None:
            note_fork(self.folder, fork)
            self.save_now()
        self.folder.record(self.config, self.assembly.parts)

    def _make_writers(self) -> Iterator[Writer]:
        yield PngFiles(self.folder.pictures)
        if self.config.logging.tensorboard:
            yield TensorBoard(self.folder.tensorboard, purge_step=self.state.step + 1)
        yield JsonLines(self.folder.metrics)
        yield from self.trainer.writers

    def _already_evaluated(self) -> set[str]:
        """The evaluators that left metrics at this step."""
        names = self.world.run_on_first(lambda: metrics_at(self.folder.metrics, self.state.step))
        return {own for own in self.assembly.evaluators if any(name.startswith(f"{own}/student/") for name in names)}

    def _where(self) -> str:
        """Return where this rank stands, for the watchdog."""
        workers = self.trainer.loader.where()
        where = f"rank {self.world.rank}, step {self.state.step + 1:,}" + (f"; {workers}" if workers else "")
        return where + dump_flights()

    def _place(self) -> str:
        """Return where the run stands, for people."""
        step, batch = self.state.step, self.config.training.batch_size
        return f"{self.folder.path} at step {step:,} (sample {step * batch:,}, epoch {step // self.steps_per_epoch})"

    def _announce(self, saved: Mapping[str, Any] | None, fork: Fork | None) -> None:
        """Say what is trained on what, from where on."""
        if fork is not None:
            log.info("%s, training goes on in %s.", fork, self._place())
        elif saved is None:
            size = sum(parameter.numel() for parameter in self.state.model.parameters())
            log.info(
                "training %s (%s parameters) into %s: %s steps, %s an epoch, batch %s, %s on %s",
                *(
                    self.config.name,
                    f"{size:,}",
                    self.folder.path,
                    f"{self.total_steps:,}",
                    f"{self.steps_per_epoch:,}",
                ),
                *(f"{self.config.training.batch_size:,}", self.state.precision, self.state.device),
            )
            if self.assembly.start:
                log.info("%s", self.assembly.start)
        else:
            before = saved["ranks"]
            moved = f" on {self.world.size} ranks; it was saved on {before}" if before != self.world.size else ""
            log.info("resuming %s%s.", self._place(), moved)
        self._announce_precision(saved)
        if self.attention:
            log.info("attention: %s", self.attention)
        if self.assembly.frozen:
            log.info("frozen, since no loss reads them: %s", listed(self.assembly.frozen, limit=8))

    def _announce_precision(self, saved: Mapping[str, Any] | None) -> None:
        """Say what ``auto`` is, that it has changed, and where a precision has no fast path."""
        precision, device = self.state.precision, self.state.device
        before = precision if saved is None else saved.get("precision", precision)
        if before != precision:
            log.info("precision: %s (auto on %s); until here it was %s", precision, device.type, before)
        elif self.config.training.precision == "auto":
            log.info("precision: %s (auto on %s)", precision, device.type)
        if saved is None and not has_fast_path(precision, device):
            faster = "amp_fp16" if device.type == "cuda" else "fp32"
            log.warning(
                "training.precision: this %s has no fast path for %s, and a step may take many times as long. "
                "Faster here: training.precision=%s",
                *(device.type, precision, faster),
            )
