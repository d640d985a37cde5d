"""Several ranks from Python: the calling process is the first of them, and starts the others."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cosmos_ssl import registry
from cosmos_ssl.config import LoadedConfig, part_paths
from cosmos_ssl.errors import CosmosError, StorageError, TrainingError, UserError, first_line

T = TypeVar("T")

GRACE = 20.0
"""Seconds that the other ranks have to end by themselves once the first has."""

_PREFIX = "profile."
_READY = "ready"


def split_ranks(overrides: Sequence[str]) -> tuple[list[str], int]:
    """The overrides without ``profile.nproc=N``, and N. Raises UserError for another key of a profile."""
    ranks = 1
    for text in overrides:
        key, _, value = text.removeprefix(_PREFIX).partition("=")
        if text.startswith(_PREFIX):
            if key != "nproc" or not (value.isascii() and value.isdecimal() and int(value) > 0):
                raise UserError(
                    f"{text}: from Python profile.nproc=N is known; all else of a profile is cosmos-launch's"
                )
            ranks = int(value)
    return [text for text in overrides if not text.startswith(_PREFIX)], ranks


def on_ranks(count: int, loaded: LoadedConfig, work: Callable[[LoadedConfig], T]) -> T:
    """Return what ``work`` returns here, as the first of ``count`` ranks; the others do the same with the same config.

    Classes that the config was given are found by the others by their modules. Raises what ``work`` raises; of a rank
    that failed for a reason of its own, that.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # held here: no rank has to be first
    types = {keys.get("type") for _, _, keys in part_paths(loaded.tree)}
    classes = {name: cls for name, cls in registry.given_classes().items() if name in types}
    place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "RANK": 0, "LOCAL_RANK": 0}
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    threads = max(1, (os.cpu_count() or 1) // count)
    others: list[Any] = []
    with _variables(place):
        try:
            for rank in range(1, count):
                given = {**place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": threads}
                arguments = (os.getpid(), given, loaded.tree, classes, work, told)
                others.append(context.Process(target=_rank, args=arguments, name=f"rank {rank}"))
                others[-1].start()
            _wait_until_ready(others, told)
            with _threads(threads):
                return work(loaded)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if len(others) < count - 1 or others[-1].pid is None:
                raise UserError(
                    f"profile.nproc: other processes cannot import what the config holds ({first_line(error)}). "
                    "Define its classes at the top of a module"
                ) from error
            raise
        except StorageError as error:  # what the end of another one looks like from here
            _end(others)
            while not told.empty():
                if not isinstance(theirs := told.get(), StorageError | str):
                    raise theirs from error
            raise
        finally:
            _end(others)


def _wait_until_ready(others: Sequence[Any], told: Any) -> None:
    """Raise UserError where a process ends before it has joined: the others would wait for it."""
    ready = 0
    while ready < len(others):
        if not told.empty():
            found = told.get()
            if found != _READY:
                raise found
            ready += 1
        elif any(process.exitcode is not None for process in others):
            raise UserError(
                "profile.nproc: another process could not be started; it says why above. Classes of the config lie at "
                'the top of a module, and a script calls train under: if __name__ == "__main__":'
            )
        else:
            time.sleep(0.02)


def _rank(
    parent: int,
    place: Mapping[str, object],
    tree: Mapping[str, Any],
    classes: Mapping[str, type[Any]],
    work: Callable[[LoadedConfig], object],
    told: Any,
) -> None:
    """Be one of the other ranks, bound to the life of the first."""
    from cosmos_ssl.config import load_config

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the call above
            return
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(int(str(place["OMP_NUM_THREADS"])))
    for name, cls in classes.items():
        registry.give_class(name, cls)
    try:
        loaded = load_config(tree)
        told.put(_READY)
        work(loaded)
    except CosmosError as error:
        told.put(error)
        sys.exit(error.exit_code)
    except Exception as error:
        told.put(TrainingError(f"rank {place['RANK']} failed: {type(error).__name__}: {first_line(error)}"))
        raise


def _end(others: Sequence[Any]) -> None:
    deadline = time.monotonic() + GRACE
    for process in others:
        if process.pid is not None:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


@contextmanager
def _variables(values: Mapping[str, object]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
