"""Training: a run is started or resumed, loops over updates, logs, saves, evaluates, and finishes."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor

from cosmos_ssl.api import CallbackContext, Progress, RunInfo
from cosmos_ssl.config import Config
from cosmos_ssl.config.ranks import check_ranks
from cosmos_ssl.data.loader import LoadedBatch
from cosmos_ssl.engine.ahead import on_device
from cosmos_ssl.engine.assembly import Assembly, make_loader, make_order, total_steps
from cosmos_ssl.engine.background import CheckpointWriter
from cosmos_ssl.engine.callbacks import Callbacks
from cosmos_ssl.engine.checkpoint import keep_as, latest_checkpoint
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
from cosmos_ssl.engine.evaluation_signals import EvaluationSignals
from cosmos_ssl.engine.exchange import check_replicas, share_start, spread
from cosmos_ssl.engine.fork import Fork, note_fork, plan_fork, refusing, told_fork
from cosmos_ssl.engine.garbage import collected_at_will, collected_on_schedule
from cosmos_ssl.engine.memory import dump_memory, enough_memory, explain_shortage, record_allocations
from cosmos_ssl.engine.metrics import (
    JsonLines,
    Writer,
    Writers,
    cut_rows,
    default_writers,
    metrics_at,
)
from cosmos_ssl.engine.prolong import Longer, plan_longer, same_until, stable_steps
from cosmos_ssl.engine.remote import bring_back
from cosmos_ssl.engine.rollback import Record, Rise, Rollback, reach_of, read_records, write_records
from cosmos_ssl.engine.run_folder import RunFolder, versions
from cosmos_ssl.engine.segments import begin_segment, read_segment, save_reported
from cosmos_ssl.engine.signals import AHEAD, Interrupted, Signals
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.engine.step import News, Step, Update
from cosmos_ssl.engine.trace import traced
from cosmos_ssl.engine.watch import Clock, Watch, lines
from cosmos_ssl.engine.watchdog import Watchdog, watched_start
from cosmos_ssl.errors import CosmosError, StorageError, TrainingError, UserError, listed
from cosmos_ssl.files import checkpoint_folder, checkpoint_step, storage_faults
from cosmos_ssl.functional import gather_objects
from cosmos_ssl.functional.kernels import explain_kernels
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
        elif self.device.type == "cuda":
            record_allocations()
        self.console = console or Console(quiet=not self.world.first)
        self.writers = writers
        self.keep = True
        """Whether checkpoints are written, and signals wait for one; and a snapshot of memory where it is used up."""
        self.signals = signals or Signals(at_once=True)
        self._watching = signals is not None
        check_ranks(config, self.world.size)
        assert assembly.dataset is not None, "a model built to be read, not trained"
        self.dataset = assembly.dataset
        self.order = make_order(config, self.dataset.shard_sizes)
        pin, rank, world = self.device.type == "cuda", self.world.rank, self.world.size
        self.loader = make_loader(assembly, config, self.order, rank=rank, world=world, pin=pin)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.total_steps = total_steps(config, self.order)
        self.run: Run | None = None
        """The run under way."""
        self.starting = ExitStack()
        """A watchdog until that of the steps."""
        self.longer: Longer | None = None
        """On the first rank: what a run was that is longer now."""

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
            self.starting = stack.enter_context(ExitStack())
            self.starting.enter_context(
                watched_start(self.config.training.timeout_minutes, self.folder.log, self.world.rank)
            )
            self.world.run_on_first(lambda: stack.enter_context(self.folder.locked()))
            stack.enter_context(as_run_errors())
            if self.config.checkpoints.copy_to is not None and self.keep:
                with self.folder.logged():
                    self.world.run_on_first(self._bring_back)
            result = self.world.run_on_first(self._finished)
            if result is not None:
                self.starting.close()
                if self.world.first:
                    self._copy_rest(result["step"])
                log.info("run %s is finished (step %s)", self.folder.path, f"{result['step']:,}")
                return dict(result["metrics"])
            with self.folder.logged():
                try:
                    with ExitStack() as inner, enough_memory(self._out_of_memory):
                        self.run = Run(self, inner)
                        return self.run.to_end()
                except BaseException as error:
                    unforeseen = not isinstance(error, CosmosError) or error.__cause__ or hasattr(error, "__notes__")
                    told = error or type(error).__name__
                    log.info("the run ended: %s", told, exc_info=bool(unforeseen), extra={"file_only": True})
                    raise

    def _out_of_memory(self, error: BaseException) -> str:
        """Return what to say of it; a snapshot of a CUDA device lies in the run folder then."""
        run, place = self.run, self.folder.path / "memory" / f"rank{self.world.rank}.pickle"
        state, evaluating = (run.state, run.evaluating) if run else (None, "")
        given = (self.assembly, self.config, state, self.device)
        told = explain_shortage(error, *given, ranks=self.world.size, evaluating=evaluating)
        return told + dump_memory(self.device, place) if self.keep else told

    def _bring_back(self) -> None:
        """On the first rank: fetch a newer copy of this run's checkpoints. Raises UserError, StorageError."""
        url, accept = self.config.checkpoints.copy_to, self.config.loader.changed_data == "accept"
        assert url is not None
        self.folder.check_identity(self.identity, accept_data=accept, longer=self._plan_longer)
        bring_back(
            url,
            self.folder,
            self.identity,
            accept_data=accept,
            same_until=lambda before: same_until(before, self.assembly, self.config, self.order),
            reach=reach_of(self.config.training.rollback),
        )

    def _copy_rest(self, step: int) -> None:
        """On the first rank: copy what of a finished run is not copied yet."""
        if self.config.checkpoints.copy_to is not None and self.keep:
            stable = stable_steps(self.assembly, self.config, self.total_steps)[0]
            reach = reach_of(self.config.training.rollback)
            given = (self.folder.path, self.config.checkpoints, self.steps_per_epoch, self.total_steps)
            CheckpointWriter(*given, sound=step, stable=stable, reach=reach).close()

    def _finished(self) -> dict[str, Any] | None:
        """On the first rank: the result where nothing is left to do. Raises UserError for another's folder."""
        accept = self.config.loader.changed_data == "accept"
        self.folder.check_identity(self.identity, accept_data=accept, longer=self._plan_longer)
        result = self.folder.result()
        if result is None or (result["step"] != self.total_steps and not self._stopped_alike(result)):
            return None
        self.folder.identify(finished=True)
        return result

    def _plan_longer(self, before: Mapping[str, Any]) -> None:
        self.longer = plan_longer(self.folder.path, before, self.assembly, self.config, self.order)

    def _stopped_alike(self, result: Mapping[str, Any]) -> bool:
        """Return whether a run was ended early by callbacks that are still there, with the same options."""
        own = {name: part.model_dump() for name, part in self.config.callbacks.items()}
        stopped = result.get("stopped", {})
        return bool(stopped) and all(own.get(name) == options for name, options in stopped.items())


class Run:
    """A run under way: what it consists of while it trains, as new or as the newest sound checkpoint left it."""

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        """Start or resume; ``stack`` closes what was opened. Raises UserError, CheckpointError."""
        self.trainer, self.assembly, self.config = trainer, trainer.assembly, trainer.config
        self.world, self.folder, self.signals = trainer.world, trainer.folder, trainer.signals
        self.steps_per_epoch, self.total_steps = trainer.steps_per_epoch, trainer.total_steps
        newest = self.world.run_on_first(self._newest)
        precision = resolve_precision(self.world.run_on_first(self.folder.begun_in), trainer.device)
        dtype, widths = DTYPES[precision] or torch.float32, head_widths(self.assembly.model)
        told = [explain_backend(self.config.training.attention, trainer.device, dtype, width) for width in widths]
        self.attention = "; ".join(dict.fromkeys(told))  # refused now rather than within the first step
        self.kernels = explain_kernels(self.config.training.kernels, trainer.device, dtype)
        self.callbacks = Callbacks(self.assembly.callbacks, self.config.training.seed)
        self.state = RunState(self.assembly, self.callbacks.with_rules(self.config), trainer.device, precision)
        self.state.model.train()
        self.step = Step(self.assembly, self.state, self.config.training)
        with refusing(self.folder):
            fork = self.world.run_on_first(self._fork) if newest is None else None
            source = newest if fork is None else fork.checkpoint
            saved = self.state.restore(source) if source is not None else None
        if source is not None and saved is not None:
            self.callbacks.restore(source, saved)
        if source is None:
            share_start(self.state.replicas)
        self.rollback = Rollback(self.config.training.rollback if trainer.keep else None, trainer.order)
        self.rollback.restore(saved or {}, self.world.run_on_first(lambda: read_records(self.folder.path)))
        if fork is not None:
            self.state.step = fork.step
            self.rollback.fork(fork.step, fork.skipped)
        reported: Mapping[int, frozenset[str]] = {}
        if self.world.first:
            reported = save_reported(self.folder.path, self.state.step).reported
            cut_rows(self.folder.metrics, self.state.step)
        self.evaluated = self._already_evaluated()
        self.measured = self.world.run_on_first(self._measured)
        """The last of each number since the last epoch's end."""
        self._announce(saved, fork)
        self.writers = self._make_writers(reported) if self.world.first else Writers([])
        stack.callback(self.writers.close)
        self.checkpoints = self._make_checkpoints(None if newest is None else self.state.step)
        stack.push(self.checkpoints)
        self._settle(fork)
        trainer.loader.check_limits()
        self.signals.at_once = not trainer.keep
        trainer.starting.close()
        self.watchdog = stack.enter_context(
            Watchdog(self.config.training.timeout_minutes, self.folder.log, self._where)
        )
        self.watch = Watch(trainer.console, self.total_steps, self.steps_per_epoch, lambda: self.checkpoints.seconds)
        stack.enter_context(self.watch.showing(self.state.step))
        self.clock = Clock(self.state.device, self.state.precision)
        self.between_steps = True
        """Whether what an error leaves behind can be saved."""
        self.evaluation_signals = EvaluationSignals(self.signals, self.world)
        self.evaluating = ""
        """The evaluator under way."""
        self.callbacks.call("start", self._context())
        self._keep()
        if self.rollback.reach and source is None:
            self.save_together()  # what the first steps may go back to

    def to_end(self) -> dict[str, float]:
        """Loop and finish; the final metrics. What ends the run between two steps finds it saved."""
        try:
            while True:
                self.evaluate()  # what a resumed run still owes
                self.loop()
                if (rise := self.rollback.rise()) is None:
                    break
                self._go_back(rise)
            if self.state.step < self.total_steps:  # callbacks have ended it
                self.evaluated = self._already_evaluated()
                self._evaluate(self.state.step)
        except (Interrupted, TrainingError):
            raise
        except Exception:
            self.checkpoints.leave()  # other ranks may be gone
            if self.between_steps:
                self.save_alone()
            raise
        self.save_together()
        return self.finish()

    # ------------------------------------------------------------------ the loop

    def loop(self) -> None:
        """Make the updates that are left; after each log, save and evaluate where it is due.

        Ends early where callbacks ask for it.
        """
        if self._stops():
            return
        left = self.total_steps - self.state.step
        path, paused, first = self.folder.trace, self.clock.paused, self.state.step + 1
        batches = on_device(self._batches(), self.state.device)
        batches = traced(batches, self.config.training.trace_steps, left, self.state.device, path, paused)
        # whatever ends the loop, workers do not outlive it
        with closing(batches), collected_on_schedule() as stepped:
            began = time.monotonic()
            for batch in batches:
                self.between_steps = False
                self.watchdog.alive()
                progress = Progress(
                    step=self.state.step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
                )
                if self.callbacks.has("before_step"):
                    self.callbacks.call("before_step", self._context(progress))
                with self.clock.step():
                    update = self.step(batch.views, progress, lambda b=batch: self._news(b))  # type: ignore[misc]
                if update.told.sound and self.callbacks.has("after_step"):
                    self.callbacks.call("after_step", self._context(progress))
                self.state.step += 1
                if self.state.step == first:
                    be_impatient()
                self._count(update.told.news, batch)
                self.rollback.observe(update.told.loss)
                self.between_steps = True
                self.signals.ahead = f"{AHEAD} (a step takes about {time.monotonic() - began:.0f} s)"
                self.log(update)
                self.save_if_due(update.told.news)
                if update.told.news.signal:
                    self._leave(update.told.news.signal, together=True)
                self.evaluate()
                stepped(self.state.step)
                if self._stops():
                    break
                began = time.monotonic()

    def _go_back(self, rise: Rise) -> None:
        """Become what the run was at a checkpoint before the loss rose, with other samples ahead; all ranks together.

        Raises TrainingError as ``Rollback.plan``.
        """
        self.between_steps = False  # nothing of what is between two states is saved
        source, record = self.world.run_on_first(lambda: self._make_way(rise))
        saved = self.state.restore(source)
        self.callbacks.restore(source, saved)
        self.callbacks.stop.clear()
        self.rollback.restore(saved, self.rollback.records)
        self.rollback.note(record)
        if self.world.first:
            self.writers.restart(self._run_info(), save_reported(self.folder.path, self.state.step).reported)
        self.evaluated, self.measured = self._already_evaluated(), self.world.run_on_first(self._measured)
        self.clock = Clock(self.state.device, self.state.precision)
        self.watchdog.alive()
        self.between_steps = True

    def _make_way(self, rise: Rise) -> tuple[Path, Record]:
        """On the first rank: remove what is newer than the checkpoint to go back to, then write down that it is so."""
        self.checkpoints.settle()
        source, record = self.rollback.plan(rise, self.state.step, self.folder.path)
        with storage_faults(f"{self.folder.path} cannot be written"):
            step = checkpoint_step(source) or 0
            self.checkpoints.go_back(step)
            begin_segment(self.folder.path, step, self.writers.drop_rows)
            write_records(self.folder.path, [*self.rollback.records, record])
        return source, record

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
        self.save_together() if together else self.save_alone()
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
        if not row.get("mfu", 1):  # not known
            del row["mfu"]
        row |= {"skipped_steps": self.state.counters.skipped, "bad_samples": self.state.budget.bad}
        row |= self.rollback.numbers
        if self.state.scaler is not None:
            row["loss_scale"] = self.state.scaler.get_scale()
        self.measured |= row
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
            self._before_checkpoint()
            self._save()

    def _before_checkpoint(self) -> None:
        """On all ranks, before one is taken. Raises TrainingError where they do not stand at the same."""
        self.callbacks.once("at_checkpoint", self._context())
        own, theirs = self.state.replicas, self.callbacks.replicas
        check_replicas(own | theirs, lambda name: (self.callbacks if name in theirs else self.state).owner(name))

    def _save(self) -> None:
        """Hand a snapshot to the writer, on the first rank; of what ranks share all of them take it together."""
        if self.world.first:
            self.writers.sync()
        if self.state.sharding.on:
            self.checkpoints.prepare()
            # with it all ranks wait until the folder is there: those of another copy of the weights take no part below
            self.world.run_on_first(lambda: self.checkpoints.begin(self.state.step))
        if self.world.first or self.state.sharding.on:
            about = self._about() if self.world.first else {}
            self.checkpoints.write(self.callbacks.added(self.state.snapshot(about)))

    def _about(self) -> dict[str, Any]:
        """On the first rank: what a checkpoint says of the run."""
        identity = self.trainer.identity
        return {
            "samples": self.state.step * self.config.training.batch_size,
            "epoch": self.state.step / self.steps_per_epoch,
            "ranks": self.world.size,
            "precision": self.state.precision,
            "identity": {"config": identity.digest(), "data": identity.data},
            "versions": versions(self.assembly.parts),
            **self.rollback.state(),
        }

    def save_together(self) -> None:
        """Save where all ranks stand. Raises StorageError, TrainingError where they do not stand at the same."""
        self._before_checkpoint()
        self._save_missing()
        self.world.run_on_first(self._wait)

    def _save_missing(self) -> None:
        """Begin the checkpoint of this step, unless there is one, all ranks together."""
        if self.world.run_on_first(lambda: self.checkpoints.writes and not self.checkpoints.has(self.state.step)):
            self._save()

    def _wait(self) -> None:
        """On the first rank: wait for the checkpoint of this step. Raises StorageError."""
        if self.checkpoints.writes:
            self.checkpoints.wait(self.state.step)

    def save_alone(self) -> None:
        """Save where the run stands and wait for it, on the first rank, while the others may be gone: without them it
        cannot where ranks share weights, and the run goes on from the last checkpoint. Raises StorageError.
        """
        if not self.checkpoints.writes:
            return
        if not self.checkpoints.has(self.state.step):
            if self.state.sharding.on:
                log.warning("step %s is not saved, which takes all ranks", f"{self.state.step:,}")
                return
            self._save()
        self._wait()

    def evaluate(self) -> None:
        """Run the evaluators that are due and have not run at this step, then the callbacks. Raises Interrupted."""
        step = self.state.step
        self._evaluate(self.total_steps)
        if step and (step == self.total_steps or step % self.steps_per_epoch == 0):
            self.callbacks.once("at_epoch", self._context())
            self._keep()
            self.measured = {}

    def _evaluate(self, last: int) -> None:
        """Run the evaluators that are due where the run ends at step ``last``."""
        step = self.state.step
        names = [
            name
            for name in due(self.assembly.evaluators, step, self.steps_per_epoch, last)
            if name not in self.evaluated
        ]
        if names and self.state.sharding.on:  # a signal that reaches one rank within finds it saved
            self._before_checkpoint()
            self._save_missing()
        for name in names:
            start, ahead = time.monotonic(), self.signals.ahead
            self.signals.ahead = "the evaluation ends after the batch under way, then all is saved"
            with self.clock.paused(), collected_at_will():
                dtype, self.evaluating = DTYPES[self.state.precision], name
                try:
                    given = (name, self.assembly, self._alive, dtype)
                    found = self.evaluation_signals.run(partial(evaluate, *given, pictures=self.world.first))
                except Interrupted as error:
                    self._leave(error.number, together=error.together)
                self.evaluating = ""
                self.measured |= found.metrics
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
        self.evaluation_signals.check()

    def finish(self) -> dict[str, float]:
        """Mark the run as finished and show its final table."""
        self.writers.sync()
        metrics = self.world.run_on_first(lambda: metrics_at(self.folder.metrics, self.state.step))
        if self.world.first:
            early = self.callbacks.stop if self.state.step < self.total_steps else {}
            stopped = {name: self.config.callbacks[name].model_dump() for name in early}
            self.folder.finish(self.state.step, metrics, stopped)
        roles = (*self.state.models, *self.callbacks.parts)
        self.watch.table(f"{self.config.name} after {self.state.step:,} steps", metrics, roles)
        log.info("finished %s", self._place())
        return metrics

    # ------------------------------------------------------------------ the start, for the constructor

    def _newest(self) -> Path | None:
        """On the first rank: the checkpoint to go on from; of a run that is longer now, none that the old end shaped.

        Raises UserError.
        """
        longer = self.trainer.longer
        return latest_checkpoint(self.folder.path) if longer is None else longer.start(self.folder.path)

    def _fork(self) -> Fork | None:
        """On the first rank: where to start, if the folder says that its run goes on from another. Raises UserError."""
        checkpoint = told_fork(self.folder)
        if checkpoint is None:
            return None
        return plan_fork(checkpoint, self.trainer.identity, self.config, self.trainer.dataset.shard_sizes)

    def _settle(self, fork: Fork | None) -> None:
        """Make the folder this run's; what was taken over from another run is kept here too."""
        if fork is not None:
            self.world.run_on_first(lambda: note_fork(self.folder, fork))
            self._save_missing()
            self.world.run_on_first(self._wait)
        self.world.run_on_first(lambda: self.folder.record(self.config, self.assembly.parts))

    def _make_checkpoints(self, sound: int | None) -> CheckpointWriter:
        """Return what writes them; ``sound``: the step of the one that the run goes on from."""
        return CheckpointWriter(
            self.folder.path,
            self.config.checkpoints,
            self.steps_per_epoch,
            self.total_steps,
            sound=sound,
            stable=stable_steps(self.assembly, self.config, self.total_steps)[0],
            reach=self.rollback.reach,
            writes=self.world.first and self.trainer.keep,
        )

    def _make_writers(self, reported: Mapping[int, frozenset[str]]) -> Writers:
        """The run's own file first, so that what it lacks nobody was given."""
        assembly, folder = self.assembly, self.folder
        parts = default_writers(assembly.spec, self.config.logging) | dict(assembly.writers)
        return Writers([JsonLines(folder.metrics), *parts.values(), *self.trainer.writers], self._run_info(), reported)

    def _run_info(self) -> RunInfo:
        return RunInfo(
            folder=self.folder.path,
            name=self.config.name,
            id=self.folder.run_id(),
            step=self.state.step,
            segment=read_segment(self.folder.path).number,
            config=self.config.model_dump(),
        )

    def _measured(self) -> dict[str, float]:
        """On the first rank: the numbers since the epoch's end before this step."""
        step = self.state.step
        first = (max(step - 1, 0)) // self.steps_per_epoch * self.steps_per_epoch + 1
        return metrics_at(self.folder.metrics, step, first) if self.callbacks.told.get("at_epoch") != step else {}

    # ------------------------------------------------------------------ callbacks

    def _context(self, progress: Progress | None = None) -> CallbackContext:
        """What callbacks see; without ``progress`` between two steps."""
        total, epoch = self.total_steps, self.steps_per_epoch
        now = progress or Progress(step=self.state.step, total_steps=total, steps_per_epoch=epoch)
        models = self.state.models
        return CallbackContext(
            model=models["student"],
            teacher=models.get("teacher"),
            progress=now,
            writers=self.writers,
            metrics=self.measured,
        )

    def _stops(self) -> bool:
        """Return whether the loss has risen, or callbacks ask for the end.

        Raises TrainingError where ranks do not agree on the latter.
        """
        if self.rollback.rise() is not None:
            return True
        step = self.state.step
        if not self.callbacks.parts or not step or step == self.total_steps or step % self.steps_per_epoch:
            return False
        asked = bool(self.callbacks.stop)
        most, most_not = self.world.most([asked, not asked])
        if most and most_not:
            raise TrainingError("callbacks ask for the run's end on some ranks alone: let them judge by ctx.metrics")
        if asked:
            told = "; ".join(f"callbacks.{name}: {reason}" for name, reason in self.callbacks.stop.items())
            log.info("the run ends early at step %s: %s", f"{step:,}", told)
        return asked

    def _keep(self) -> None:
        """Keep the checkpoint of this step under the names that callbacks ask for, all ranks together."""
        if not self.callbacks.keep:
            return
        try:
            self.save_together()
            self.world.run_on_first(self._keep_first)
        except (StorageError, UserError) as error:
            if self.config.checkpoints.on_failure == "stop":
                raise
            log.warning("%s; training goes on", error)
        self.callbacks.keep.clear()

    def _keep_first(self) -> None:
        for name in self.callbacks.keep:
            with storage_faults(f"callbacks.{name}: the checkpoint of step {self.state.step:,} cannot be kept"):
                keep_as(checkpoint_folder(self.folder.path, self.state.step), name)

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
            trained = sum(parameter.numel() for parameter in self.state.optimizer.names.values())
            log.info(
                "training %s (%s parameters%s) into %s: %s steps, %s an epoch, batch %s, %s on %s",
                *(
                    self.config.name,
                    f"{size:,}",
                    f", {trained:,} of them trained" if trained < size else "",
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
        for notice in self.assembly.notices:
            log.info("%s", notice)
        self._announce_precision(saved)
        if self.attention:
            log.info("attention: %s", self.attention)
        log.info("kernels: %s", self.kernels)
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
