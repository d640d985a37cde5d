"""All that a start would refuse, looked for ahead of it: in a dry run, before a job is queued or ranks are started."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from cosmos_ssl.api import IndexedDataset
from cosmos_ssl.build.builder import PRETRAINED, Builder
from cosmos_ssl.build.runs import claim, preparing, watched
from cosmos_ssl.build.weights import start_from
from cosmos_ssl.config import LoadedConfig
from cosmos_ssl.config.ranks import check_ranks
from cosmos_ssl.data.cache import only_looking
from cosmos_ssl.engine.assembly import Assembly, make_loader, make_order
from cosmos_ssl.engine.checkpoint import check_fit, latest_checkpoint, load_exactly, load_tensors
from cosmos_ssl.engine.distributed import pick_device
from cosmos_ssl.engine.fork import ask_fork, fork_source, plan_fork, told_fork
from cosmos_ssl.engine.prolong import plan_longer
from cosmos_ssl.engine.run_folder import RunFolder
from cosmos_ssl.engine.state import check_compiler
from cosmos_ssl.errors import ConfigError, DataError
from cosmos_ssl.files import storage_faults
from cosmos_ssl.identity import Identity
from cosmos_ssl.interop.foreign import is_remote
from cosmos_ssl.liveness import doing
from cosmos_ssl.models.attention import resolve_backend
from cosmos_ssl.models.contract import blaming
from cosmos_ssl.models.precision import DTYPES, resolve_precision
from cosmos_ssl.models.transformer import head_widths


@storage_faults("storage fails")
def make_ready(loaded: LoadedConfig, *, scan: bool = True, fork: str | None = None) -> None:
    """Claim the run folder, index the data, and look for all else that a run needs, before it is started elsewhere.

    ``fork``: the run that it goes on from, which is noted in the folder. Raises UserError where something is missing or
    the folder is another run's, and, without ``scan``, where shards are not indexed yet.
    """
    with watched(loaded):
        with doing(f"claiming the run folder {loaded.config.folder}"):
            claim(loaded.config.folder)
        builder = Builder(loaded)
        if not scan:
            with preparing():
                _check_indexed(builder.assemble("check"))
        _check_rest(builder, builder.assemble("prepare", watched=preparing), fork, prepared=True)
    if fork is not None:
        ask_fork(RunFolder(loaded.config.folder), fork)


@storage_faults("storage fails")
@only_looking()
def dry_run(loaded: LoadedConfig, *, here: bool, ranks: int = 1, fork: str | None = None) -> str:
    """Look for all that a start would refuse, but write and index nothing; return what was not looked into.

    ``here``: training would take place on this machine, else in a job; ``ranks``: in so many processes. Raises
    UserError, StorageError.
    """
    check_ranks(loaded.config, ranks)
    config, builder = loaded.config, Builder(loaded)
    folder = RunFolder(config.folder)
    folder.check_free()
    assembly = builder.assemble("check")
    if here:
        device = pick_device(config.training.device)
        dtype = DTYPES[resolve_precision(config.training.precision, device)] or torch.float32
        for width in head_widths(assembly.model):
            resolve_backend(config.training.attention, device, dtype, width)
        if config.training.compile:
            check_compiler(device)
    dataset = assembly.dataset
    assert dataset is not None, "a config that was checked"
    with blaming(dataset, "data"):
        there = dataset.check_exists()
        if there and not here:
            _check_indexed(assembly)
        indexed = there and isinstance(dataset, IndexedDataset) and dataset.is_indexed
    if indexed:
        assembly = builder.assemble("prepare")
    else:
        _check_evaluators(builder, assembly, there)
    if indexed:
        order = make_order(config, dataset.shard_sizes)
        if here:
            make_loader(assembly, config, order, rank=0, world=ranks, pin=False).check_limits()
    left = [] if indexed else ["what the data hold, which are not indexed yet"]
    left = left if there else ["the data, which are made or found at the start"]
    left += _check_rest(builder, assembly, fork, prepared=indexed)
    folder.result()
    if (newest := latest_checkpoint(folder.path)) is not None:
        check_fit(assembly.model, load_tensors(newest, "student"), newest)
    elif fork is None:
        told_fork(folder)
    return "; ".join(left)


def _check_indexed(assembly: Assembly) -> None:
    dataset = assembly.dataset
    if isinstance(dataset, IndexedDataset) and dataset.index_command is not None and not dataset.is_indexed:
        raise DataError(f"data: these shards are not indexed yet. Run: {dataset.index_command}")


def _check_evaluators(builder: Builder, assembly: Assembly, there: bool) -> None:
    """Raise ConfigError for data of evaluators that are missing, except those that the data set has yet to make."""
    missing = builder.missing_data({name: each.evaluator for name, each in assembly.evaluators.items()})
    if missing and not there:
        alone = builder.make_evaluators(replace(assembly.spec, validation_data=None))
        own = builder.missing_data(alone)  # the same words without the data set: it has nothing to do with it
        missing = [fault for fault in missing if fault in own]
    if missing:
        raise ConfigError(missing)


def _check_rest(builder: Builder, assembly: Assembly, fork: str | None, *, prepared: bool) -> list[str]:
    """Look at weights, teacher, and whose the run folder is; ``prepared``: the data are known.

    Returns what is left to the start, since it is fetched.
    """
    config, dataset, places = builder.config, assembly.dataset, assembly.places()
    assert dataset is not None, "a config that was checked"
    fetched = {path: what for path, what in places.items() if what is not None and is_remote(what)}
    with _no_copies():
        if config.model.pretrained is not None and not any(path.startswith(PRETRAINED) for path in fetched):
            start_from(builder.unadapted(assembly), config.model)
    with blaming(assembly.teacher, "teacher"):
        if not any(path.startswith("teacher.") for path in fetched):
            assembly.teacher.prepare()
    folder = RunFolder(config.folder)
    source = fork_source(folder, fork) if fork is not None else None
    mine = Identity.of(config, dataset.identity() if prepared else {}, places)

    def longer(before: Mapping[str, Any]) -> None:
        if prepared:
            plan_longer(folder.path, before, assembly, config, make_order(config, dataset.shard_sizes))

    folder.check_identity(mine, accept_data=config.loader.changed_data == "accept", longer=longer)
    if source is not None:
        with _no_copies():
            load_exactly(assembly.model, load_tensors(source, "student"), f"--fork: {source}")
        if prepared:
            plan_fork(source, mine, config, dataset.shard_sizes)
    return [f"{path} ({what}), which is fetched at the start" for path, what in fetched.items()]


@contextmanager
def _no_copies() -> Iterator[None]:
    """Weights are held against a model without memory: PyTorch need not warn that nothing is copied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        yield
