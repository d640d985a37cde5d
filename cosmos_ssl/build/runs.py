"""What is done with a config in this process: it is checked, and trained."""

from __future__ import annotations

import atexit
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cosmos_ssl.build.builder import Builder
from cosmos_ssl.build.ranks import on_ranks, split_ranks
from cosmos_ssl.config import LoadedConfig, load_config
from cosmos_ssl.config.ranks import check_ranks, started_ranks
from cosmos_ssl.engine.accumulate import refuse_accumulation
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.distributed import World, joined_world
from cosmos_ssl.engine.fork import ask_fork
from cosmos_ssl.engine.metrics import Writer
from cosmos_ssl.engine.optim import Optimizer, trained
from cosmos_ssl.engine.probe import Rows, measured
from cosmos_ssl.engine.remote import url_fault
from cosmos_ssl.engine.run_folder import RunFolder
from cosmos_ssl.engine.signals import Interrupted, Signals
from cosmos_ssl.engine.trainer import Trainer
from cosmos_ssl.engine.watchdog import watched_start
from cosmos_ssl.errors import CheckpointError, ConfigError
from cosmos_ssl.files import run_path, storage_faults
from cosmos_ssl.liveness import doing
from cosmos_ssl.registry import shown
from cosmos_ssl.streams import steady_streams


def train(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    fork: str | Path | None = None,
    writers: Sequence[Writer] = (),
) -> dict[str, float]:
    """Train what ``config`` says (a file, a packaged name, or a mapping in which classes may stand for parts); the
    final metrics.

    ``overrides`` are ``key.sub=value`` strings. The same call again resumes. ``fork``: the run folder, or one of its
    checkpoints, whose weights, teacher, optimiser and step a new run takes over. ``writers`` also get the metrics.
    With ``profile.nproc=N`` among the overrides this process is the first of N ranks, and starts the others, which find
    classes by their modules; a script is then called under ``if __name__ == "__main__":``. Under torchrun or srun, it
    is one of theirs. Raises UserError for a config, data or a run folder that cannot be used.
    """
    own, ranks = split_ranks(overrides)
    loaded = load_config(config, own)
    if started_ranks() > 1 or ranks == 1:
        check(loaded)
        return run(loaded, fork=fork, writers=writers)
    check_ranks(loaded.config, ranks)
    check(loaded)
    from cosmos_ssl.build.readiness import make_ready

    make_ready(loaded, fork=None if fork is None else str(fork))
    return on_ranks(ranks, loaded, partial(_run_with, writers=Unsent(writers)))


class Unsent:
    """Writers, which stay with the first rank: another process gets none."""

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self.writers = writers

    def __reduce__(self) -> tuple[Any, ...]:
        return Unsent, ()


def _run_with(loaded: LoadedConfig, *, writers: Unsent) -> dict[str, float]:
    return run(loaded, writers=writers.writers)


def make_trainer(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    fork: str | Path | None = None,
    writers: Sequence[Writer] = (),
) -> Trainer:
    """The trainer that ``train`` runs, with all parts built; ``writers`` also get the metrics.

    Under torchrun or srun this process is one of their ranks until it ends. Raises as ``train`` does.
    """
    loaded = load_config(config, overrides)
    check(loaded)
    if started_ranks() > 1:
        world = ExitStack()
        world.enter_context(joined_world(loaded.config.training.device, loaded.config.folder))
        atexit.register(world.close)
    return _trainer(loaded, fork=fork, writers=writers)


def check(loaded: LoadedConfig) -> Assembly:
    """Stage two: import the named parts, check their options and what they require, on the meta device.

    Raises ConfigError, PluginError, UserError.
    """
    _check_names(loaded)
    if loaded.config.data is None:
        raise ConfigError([loaded.fault("data", "a run needs a data set, such as data: {type: scenes}")])
    if loaded.config.training.deterministic and loaded.config.training.attention == "xformers":
        told = (
            "xformers adds up gradients in an order that differs from run to run, which training.deterministic refuses"
        )
        raise ConfigError([loaded.fault("training.attention", f"{told}. Set it to auto, varlen or sdpa")])
    copy_to = loaded.config.checkpoints.copy_to
    if copy_to is not None and (refused := url_fault(copy_to, loaded.config.folder)) is not None:
        raise ConfigError([loaded.fault("checkpoints.copy_to", refused)])
    builder = Builder(loaded)
    assembly = builder.assemble("check")
    builder.check_sizes(assembly)
    Optimizer(assembly.model, loaded.config, torch.device("meta"), assembly.optimizer, assembly.schedule)
    if loaded.config.training.micro_batch_size is not None:
        refuse_accumulation(assembly)
    trained(assembly.model, loaded.config.optimizer)
    return assembly


def _check_names(loaded: LoadedConfig) -> None:
    """Raise ConfigError where ``name`` or ``output_dir`` would write more into a batch script, or elsewhere than it
    says.
    """
    name, folder = loaded.config.name, loaded.config.output_dir
    faults = [
        loaded.fault(key, f"{shown(text)} holds control characters, such as line ends. Leave them out")
        for key, text in (("name", name), ("output_dir", folder or ""))
        if any(unicodedata.category(letter) == "Cc" for letter in text)
    ]
    try:
        run_path(loaded.config.folder)
    except CheckpointError:
        faults.append(
            loaded.fault(
                "output_dir",
                f"{folder} is a URL. Set a local directory, and checkpoints.copy_to to the URL that checkpoints are "
                "copied to",
            )
        )
    if folder is None and (name in ("", ".", "..") or "/" in name):
        faults.append(
            loaded.fault("name", f"{shown(name)} is no name of one folder in runs/. Give another name, or output_dir")
        )
    if faults:
        raise ConfigError(faults)


def run(
    loaded: LoadedConfig,
    *,
    fork: str | Path | None = None,
    leaving: Callable[[int], int] | None = None,
    writers: Sequence[Writer] = (),
) -> dict[str, float]:
    """Train a checked config in this process; the final metrics. Resumes where the run folder holds a checkpoint.

    ``fork``: a run folder, or one of its checkpoints, that a new run goes on from.
    ``leaving`` is called with the signal that ends the run, once all is saved, and gives the exit code.
    """
    with _at_work(loaded, leaving) as signals:
        return _trainer(loaded, fork=fork, writers=writers, signals=signals).train()


def probe(loaded: LoadedConfig, steps: int, *, leaving: Callable[[int], int] | None = None) -> list[tuple[str, str]]:
    """Run the first ``steps`` of a checked config in this process, without checkpoints; lines to show of them.

    The config's ``output_dir`` is the caller's to remove. ``leaving``: as of ``run``.
    """
    every = max(1, min(10, steps // 4))
    wanted = [f"schedule.max_steps={min(steps, loaded.config.schedule.max_steps or steps)}"]
    probed = load_config(loaded.tree, [*wanted, f"logging.every_steps={every}"])
    rows = Rows()
    with _at_work(probed, leaving) as signals:
        trainer = _trainer(probed, fork=None, signals=signals, writers=[rows])
        trainer.keep = False
        trainer.train()
        return measured(loaded.config, trainer, rows.rows)


@contextmanager
def _at_work(loaded: LoadedConfig, leaving: Callable[[int], int] | None) -> Iterator[Signals]:
    """A process that trains, as a member of its world; signals are watched while entered."""
    with (
        steady_streams(),
        Signals(at_once=True, leaving=leaving) as signals,
        joined_world(loaded.config.training.device, loaded.config.folder),
    ):
        try:
            yield signals
        except Interrupted as error:
            if leaving is not None:
                error.exit_code = leaving(error.number)
            raise


@storage_faults("storage fails")
def _trainer(
    loaded: LoadedConfig, *, fork: str | Path | None, writers: Sequence[Writer] = (), signals: Signals | None = None
) -> Trainer:
    folder = loaded.config.folder
    with watched(loaded):
        with doing(f"claiming the run folder {folder}"):
            World().run_on_first(lambda: claim(folder, fork))  # said now rather than after the data is ready
        assembly = Builder(loaded).assemble("train", watched=preparing)
        return Trainer(assembly, loaded.config, folder, writers=writers, signals=signals)


def claim(folder: Path, fork: str | Path | None = None) -> None:
    """Raise UserError unless a run could write into ``folder`` now; note there what it goes on from by ``fork``."""
    with RunFolder(folder).locked():
        pass
    if fork is not None:
        ask_fork(RunFolder(folder), fork)


@contextmanager
def watched(loaded: LoadedConfig) -> Iterator[None]:
    """End this process where nothing is heard of the work before training for as long as of a step."""
    rank = World().rank
    with watched_start(loaded.config.training.timeout_minutes, RunFolder(loaded.config.folder, rank).log, rank):
        yield


def preparing() -> AbstractContextManager[None]:
    """What a watchdog says while data are looked at and indexed."""
    return doing("preparing the data")
