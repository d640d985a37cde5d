"""The training loop and what stands around it: run folder, resuming, checkpoints, metrics, evaluation, signals."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cosmos_ssl.api import Progress, Views
from cosmos_ssl.config import Config
from cosmos_ssl.config.ranks import check_ranks
from cosmos_ssl.data.loader import LoadedBatch, Loader
from cosmos_ssl.engine.assembly import Assembly, make_order, total_steps
from cosmos_ssl.engine.background import CheckpointWriter
from cosmos_ssl.engine.checkpoint import latest_checkpoint
from cosmos_ssl.engine.distributed import World, be_deterministic, keep_freed_memory, named_losses, pick_device
from cosmos_ssl.engine.evaluate import due, evaluate, summary
from cosmos_ssl.engine.fork import Fork, note_fork, plan_fork, refusing, told_fork
from cosmos_ssl.engine.metrics import JsonLines, PngFiles, TensorBoard, Writer, Writers, cut_rows, metrics_at
from cosmos_ssl.engine.run_folder import RunFolder, versions
from cosmos_ssl.engine.signals import AHEAD, Interrupted, Signals
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.engine.step import Step, StepResult, spread
from cosmos_ssl.engine.trace import traced
from cosmos_ssl.engine.watch import Clock, Watch, lines
from cosmos_ssl.engine.watchdog import Watchdog
from cosmos_ssl.errors import CosmosError, StorageError, TrainingError, listed
from cosmos_ssl.functional import gather_objects
from cosmos_ssl.identity import Identity
from cosmos_ssl.models.attention import resolve_backend
from cosmos_ssl.models.precision import DTYPES, has_fast_path, resolve_precision

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
        if self.device.type == "cpu":
            keep_freed_memory()
        resolve_backend(config.training.attention, self.device)  # refused now rather than at the first step
        self.console = console or Console(quiet=not self.world.first)
        self.extra_writers = writers
        self.signals = signals or Signals(at_once=True)
        self._watching = signals is not None
        check_ranks(config, self.world.size)
        assert assembly.dataset is not None, "a model built to be read, not trained"
        self.dataset = assembly.dataset
        loader = config.loader
        self.order = make_order(config, self.dataset.shard_sizes)
        self.loader = Loader(
            self.dataset,
            self.order,
            image=assembly.augmenters.get("image"),
            text=assembly.augmenters.get("text"),
            tokenizer=assembly.tokenizer,
            workers=loader.workers,
            rank=self.world.rank,
            world=self.world.size,
            prefetch=loader.prefetch,
            pin_memory=self.device.type == "cuda",
            background=config.model.background,
        )
        self.steps_per_epoch = self.order.steps_per_epoch
        self.total_steps = total_steps(config, self.order)
        if config.training.deterministic:
            be_deterministic()

    # ------------------------------------------------------------------ from start to end

    def train(self) -> dict[str, float]:
        """Train to the end and return the final metrics.

        Raises UserError for a run folder that is another's or in use, Interrupted after a signal (saved),
        TrainingError where going on makes no sense, StorageError where starting again may help.
        """
        with ExitStack() as stack:
            stack.enter_context(lines(self.console))
            if not self._watching:
                stack.enter_context(self.signals)
            self.world.from_first(lambda: stack.enter_context(self.folder.locked()))
            stack.enter_context(named_losses())
            metrics = self.world.from_first(self._finished)
            if metrics is not None:
                log.info("run %s is finished (step %s)", self.folder.path, f"{self.total_steps:,}")
                return metrics
            with self.folder.logged():
                try:
                    return self._run()
                except BaseException as error:
                    unforeseen = (
                        not isinstance(error, CosmosError) or error.__cause__ is not None or hasattr(error, "__notes__")
                    )
                    log.info(
                        "the run ended: %s",
                        error or type(error).__name__,
                        exc_info=unforeseen,
                        extra={"file_only": True},
                    )
                    raise

    def _finished(self) -> dict[str, float] | None:
        """On the first rank: the final metrics where there is nothing left to do.

        Raises UserError for a folder that is another run's.
        """
        self.identity = Identity.of(self.config, self.dataset.identity(), self.assembly.places())
        self.folder.belong(self.identity, accept_data=self.config.loader.changed_data == "accept")
        result = self.folder.result()
        if result is None or result["step"] != self.total_steps:
            return None
        self.folder.identify(finished=True)
        return dict(result["metrics"])

    def _run(self) -> dict[str, float]:
        """Start or resume, loop, finish."""
        with ExitStack() as stack:
            self._start(stack)
            self.between_steps = True
            try:
                self._evaluate()  # what a resumed run still owes
                self._loop()
            except Interrupted as error:
                if self.signals.agreed is None:
                    self._save_now()
                else:  # what started the ranks ends all when one leaves: not before the first has saved
                    self.world.from_first(self._save_now)
                raise Interrupted(
                    error.number, f"{error.cause}: saved {self._place()}. The same command goes on from there."
                ) from None
            except Exception as error:
                if self.between_steps and not isinstance(error, TrainingError):
                    self._save_now()
                raise
            self.world.from_first(self._save_now)
            return self._finish()

    def _start(self, stack: ExitStack) -> None:
        """Make all that a run needs, as new or as the newest sound checkpoint left it."""
        newest = self.world.from_first(lambda: latest_checkpoint(self.folder.path))
        self.precision = resolve_precision(self.world.from_first(self.folder.begun_in), self.device)
        self.state = RunState(self.assembly, self.config, self.device, self.precision)
        self.state.model.train()
        micro = self.config.training.micro_batch_size
        self.step = Step(self.assembly, precision=self.precision, micro_batch_size=micro, device=self.device)
        with refusing(self.folder):
            fork = self.world.from_first(self._fork) if newest is None else None
            source = newest if fork is None else fork.checkpoint
            saved = self.state.restore(source) if source is not None else None
        if fork is not None:
            self.state.step = fork.step
        if self.world.first:
            cut_rows(self.folder.metrics, self.state.step)
        self.evaluated = self._already_evaluated()
        self._announce(saved, fork)
        self.writers = Writers(list(self._make_writers()) if self.world.first else [])
        stack.callback(self.writers.close)
        if self.world.first:
            sound = None if newest is None else self.state.step
            self.checkpoints = CheckpointWriter(
                self.folder.path, self.config.checkpoints, self.steps_per_epoch, self.total_steps, sound
            )
            stack.callback(self.checkpoints.close)
        self.world.from_first(lambda: self._settle(fork))
        self.loader.check_limits()
        self.signals.at_once = False
        self.watchdog = stack.enter_context(
            Watchdog(self.config.training.timeout_minutes, self.folder.log, self._doing)
        )
        save_seconds = (lambda: self.checkpoints.seconds) if self.world.first else float
        self.watch = Watch(self.console, self.total_steps, self.steps_per_epoch, save_seconds)
        stack.enter_context(self.watch.showing(self.state.step))
        self.clock = Clock()

    def _fork(self) -> Fork | None:
        """On the first rank: where to start, if the folder says that its run goes on from another. Raises UserError."""
        checkpoint = told_fork(self.folder)
        return (
            None if checkpoint is None else plan_fork(checkpoint, self.identity, self.config, self.dataset.shard_sizes)
        )

    def _settle(self, fork: Fork | None) -> None:
        """On the first rank: make the folder this run's; what was taken over from another run is kept here from
        now on.
        """
        if fork is not None:
            note_fork(self.folder, fork)
            self._save_now()
        self.folder.record(self.config, self.assembly.parts)

    def _finish(self) -> dict[str, float]:
        """Mark the run as finished and show its final table."""
        self.writers.sync()
        metrics = self.world.from_first(lambda: metrics_at(self.folder.metrics, self.state.step))
        if self.world.first:
            self.folder.finish(self.total_steps, metrics)
        self.watch.table(f"{self.config.name} after {self.total_steps:,} steps", metrics)
        log.info("finished %s", self._place())
        return metrics

    # ------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        """Batch, schedules, step, teacher and optimiser, hooks; then log, checkpoint, evaluate."""
        left = self.total_steps - self.state.step
        batches = traced(
            self._batches(), self.config.training.trace_steps, left, self.device, self.folder.trace, self.clock.paused
        )
        with closing(batches):  # whatever ends the loop, workers do not outlive it
            began = time.monotonic()
            for batch in batches:
                self.between_steps = False
                self.watchdog.alive()
                self.replaced = len(batch.replaced)
                progress = Progress(
                    step=self.state.step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
                )
                numbers = self._update(batch.views.to(self.device), progress)
                self.state.step += 1
                self._count(batch)
                self.between_steps = True
                self.signals.ahead = f"{AHEAD} (a step takes about {time.monotonic() - began:.0f} s)"
                self._log(numbers)
                self._checkpoint()
                self._evaluate()
                self.signals.check_agreed()
                began = time.monotonic()

    def _batches(self) -> Generator[LoadedBatch]:
        """The batches that are left, timing the wait for each."""
        start = time.perf_counter()
        for batch in self.loader.batches(self.state.step, self.total_steps):
            self.clock.waited(time.perf_counter() - start)
            yield batch
            start = time.perf_counter()

    def _update(self, views: Views, progress: Progress) -> dict[str, Tensor | float]:
        """One step on one batch; an update that is not finite is left out. Returns what may be logged."""
        state, optimizer, scaler = self.state, self.state.optimizer, self.state.scaler
        optimizer.set(progress)
        result = self.step(views, progress, scaler)
        if scaler is not None:
            scaler.unscale_(optimizer.torch)
        optimizer.drop_frozen(progress)
        norm = optimizer.clip(self.config.training.clip_grad_norm)
        moved: Mapping[str, float] = {}
        if self._is_sound(result, norm, views, progress):
            moved = state.move(progress)
        else:
            self.step.restore_buffers()
        self.moments = result.moments
        numbers: dict[str, Tensor | float] = {**result.logs, "lr": optimizer.lr, "grad_norm": norm}
        numbers |= {f"teacher/{name}": value for name, value in moved.items()}
        if scaler is not None:
            scaler.update()
        return numbers

    def _is_sound(self, result: StepResult, norm: Tensor, views: Views, progress: Progress) -> bool:
        """Whether loss and gradient are finite on all ranks; counts what is not. Raises TrainingError after too many in
        a row.

        What all ranks must learn of at the same step travels along: signals, bad samples, a checkpoint that could not
        be written.
        """
        counters, limit = self.state.counters, self.config.training.max_nonfinite_steps
        faults = torch.stack(
            [~result.loss.isfinite(), ~norm.isfinite()]
        ).tolist()  # the one wait for the device of a step
        failed = self.world.first and self.checkpoints.fault
        *faults, signal, replaced, unsaved = self.world.most(
            [*faults, self.signals.received or 0, self.replaced, failed]
        )
        self.signals.agreed, self.replaced, self.unsaved = int(signal) or None, int(replaced), bool(unsaved)
        finite_loss, finite_norm = (not fault for fault in faults)
        if finite_loss and finite_norm:
            counters.nonfinite_in_a_row = 0
            return True
        scaler = self.state.scaler
        if finite_loss and scaler is not None and scaler.get_scale() > 1:
            counters.overflowed_steps += 1
            return False
        counters.nonfinite_steps += 1
        counters.nonfinite_in_a_row += 1
        step = self.state.step + 1
        what, keys = ("the gradient", views.keys) if finite_loss else self._culprit(result, views, progress)
        log.info("step %s: samples %s", step, ", ".join(keys), extra={"file_only": True})
        if counters.nonfinite_in_a_row >= limit:
            raise TrainingError(
                f"step {step:,}: {what} is not finite, {limit} steps in a row (training.max_nonfinite_steps). "
                f"Samples of this step: {listed(keys, limit=8)}. Those of the others are in {self.folder.log}"
            )
        log.warning(
            "step %s: %s is not finite, so the update is skipped (samples %s)", f"{step:,}", what, listed(keys, limit=8)
        )
        return False

    def _culprit(self, result: StepResult, views: Views, progress: Progress) -> tuple[str, Sequence[str]]:
        """The part that is not finite, on which rank, and the samples there."""
        parts = self.assembly.model.parts()
        values = {
            place: result.logs[place.replace("losses.", "loss/", 1)] for place in parts if place.startswith("losses.")
        }
        losses = ", ".join(parts[place] for place, value in values.items() if not value.isfinite())
        found = gather_objects((self.step.find_unsound(views, progress), losses, views.keys))
        rank = next(
            (r for r, (part, _, _) in enumerate(found) if part),
            next((r for r, (_, loss, _) in enumerate(found) if loss), 0),
        )
        part, loss, keys = found[rank]
        on = f" on rank {rank}" if self.world.size > 1 else ""
        return (part or loss or "the weighted sum of the losses") + on, keys

    # ------------------------------------------------------------------ log, checkpoint, evaluate

    def _log(self, numbers: Mapping[str, Tensor | float]) -> None:
        """Write a row, every so many steps and at the last."""
        step = self.state.step
        self.watch.stepped(step)
        if step % self.config.logging.every_steps and step != self.total_steps:
            return
        rates, seconds_a_step, own_seconds = self.clock.read(self.config.training.batch_size)
        counters = self.state.counters
        row = {"epoch": step / self.steps_per_epoch}
        numbers = {**numbers, **spread(self.moments)}
        row |= self.world.mean(
            {name: value.item() if isinstance(value, Tensor) else value for name, value in numbers.items()}
        )
        row |= dict(zip(rates, self.world.most(list(rates.values())), strict=True)) | self.world.slowest(own_seconds)
        row |= {
            "skipped_steps": counters.nonfinite_steps + counters.overflowed_steps,
            "bad_samples": self.state.budget.bad,
        }
        if self.state.scaler is not None:
            row["loss_scale"] = self.state.scaler.get_scale()
        self.writers.scalars(step, row)
        self.watch.logged(step, row, seconds_a_step)

    def _checkpoint(self) -> None:
        """Start writing a checkpoint where one is due; all ranks hear of one that failed.

        Raises TrainingError for one that was not finite, StorageError where it could not be written and that ends the
        run.
        """
        if self.unsaved:
            fault = self.world.from_first(lambda: self.checkpoints.take_fault())
            if isinstance(fault, TrainingError):
                raise fault
            if self.config.checkpoints.on_failure == "stop":
                raise StorageError(f"{fault} (checkpoints.on_failure: stop)")
            log.warning("%s; training goes on", fault)
        if self.world.first and self.checkpoints.due(self.state.step):
            self._save()

    def _save(self) -> None:
        """Hand a snapshot to the writer."""
        self.writers.sync()
        about = {
            "samples": self.state.step * self.config.training.batch_size,
            "epoch": self.state.step / self.steps_per_epoch,
            "ranks": self.world.size,
            "precision": self.precision,
            "identity": {"config": self.identity.digest(), "data": self.identity.data},
            "versions": versions(self.assembly.parts),
        }
        self.checkpoints.write(self.state.snapshot(about))

    def _save_now(self) -> None:
        """Save where the run stands and wait for it. Raises StorageError."""
        step = self.state.step
        if not self.world.first:
            return
        if not self.checkpoints.has(step):
            self._save()
        self.checkpoints.wait(step)

    def _evaluate(self) -> None:
        """Run the evaluators that are due and have not run at this step."""
        step = self.state.step
        for name in due(self.assembly.evaluators, step, self.steps_per_epoch, self.total_steps):
            if name in self.evaluated:
                continue
            start, ahead = time.monotonic(), self.signals.ahead
            self.signals.ahead = "the evaluation ends after the batch under way, then all is saved"
            with self.clock.paused():
                found = evaluate(name, self.assembly, self._alive, DTYPES[self.precision], pictures=self.world.first)
                self.writers.pictures(step, found.pictures)
                self.writers.scalars(step, {"epoch": step / self.steps_per_epoch, **found.metrics})
                self.writers.sync()
            self.signals.ahead = ahead
            log.info(
                "%s after step %s (%s, %.1f s): %s",
                name,
                f"{step:,}",
                self.precision,
                time.monotonic() - start,
                summary(found),
            )
        self.evaluated = set()

    # ------------------------------------------------------------------ small things

    def _count(self, batch: LoadedBatch) -> None:
        """Count what all ranks have consumed. Raises TrainingError past the budget."""
        replaced = gather_objects(batch.replaced) if self.replaced else []
        self.state.budget.add([item for theirs in replaced for item in theirs], self.config.training.batch_size)

    def _make_writers(self) -> Iterator[Writer]:
        yield PngFiles(self.folder.pictures)
        if self.config.logging.tensorboard:
            yield TensorBoard(self.folder.tensorboard, purge_step=self.state.step + 1)
        yield JsonLines(self.folder.metrics)
        yield from self.extra_writers

    def _already_evaluated(self) -> set[str]:
        """The evaluators that left metrics at this step."""
        names = self.world.from_first(lambda: metrics_at(self.folder.metrics, self.state.step))
        return {own for own in self.assembly.evaluators if any(name.startswith(f"{own}/student/") for name in names)}

    def _alive(self) -> None:
        """Called by an evaluation between its batches. Raises Interrupted."""
        self.watchdog.alive()
        self.signals.check()

    def _doing(self) -> str:
        workers = self.loader.where()
        return f"rank {self.world.rank}, step {self.state.step + 1:,}" + (f"; {workers}" if workers else "")

    def _place(self) -> str:
        step = self.state.step
        return (
            f"{self.folder.path} at step {step:,} (sample {step * self.config.training.batch_size:,}, epoch "
            f"{step // self.steps_per_epoch})"
        )

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
                *(f"{self.config.training.batch_size:,}", self.precision, self.device),
            )
            if self.assembly.start:
                log.info("%s", self.assembly.start)
        else:
            moved = (
                f" on {self.world.size} ranks; it was saved on {saved['ranks']}"
                if saved["ranks"] != self.world.size
                else ""
            )
            log.info("resuming %s%s.", self._place(), moved)
        self._announce_precision(saved)
        if self.assembly.frozen:
            log.info("frozen, since no loss reads them: %s", listed(self.assembly.frozen, limit=8))

    def _announce_precision(self, saved: Mapping[str, Any] | None) -> None:
        """Say what ``auto`` is, that it has changed, and where a precision has no fast path."""
        before = self.precision if saved is None else saved.get("precision", self.precision)
        if before != self.precision:
            log.info("precision: %s (auto on %s); until here it was %s", self.precision, self.device.type, before)
        elif self.config.training.precision == "auto":
            log.info("precision: %s (auto on %s)", self.precision, self.device.type)
        if saved is None and not has_fast_path(self.precision, self.device):
            faster = "amp_fp16" if self.device.type == "cuda" else "fp32"
            log.warning(
                "training.precision: this %s has no fast path for %s, and a step may take many times as long. "
                "Faster here: %s",
                *(self.device.type, self.precision, f"training.precision={faster}"),
            )
