"""Where a process stands: its device and memory, its place among the ranks, and what ranks tell one another."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from cosmos_ssl.config.ranks import started_ranks
from cosmos_ssl.errors import EXIT_LOST, CosmosError, StorageError, TrainingError, UserError, is_lost_rank
from cosmos_ssl.functional import gather_objects, rank, world_size
from cosmos_ssl.functional.collective_time import collective_time

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: longer than a save or a look-up on slow storage takes."""

LEAVING = timedelta(seconds=2)
"""How long a rank that has ended waits for the others to end."""


@contextmanager
def joined_world(device: str) -> Iterator[None]:
    """Be a member of the started world while entered: gloo for host tensors, NCCL for those on CUDA devices.

    Raises UserError where the variables that tell of it make no sense, StorageError where the others cannot be reached.
    """
    if started_ranks() == 1 or dist.is_initialized():
        yield
        return
    if "WORLD_SIZE" not in os.environ:  # srun alone
        from submitit.helpers import TorchDistributedEnvironment

        os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")  # it asks whether it is in charge
        given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ.update(given)
    cuda = pick_device(device).type == "cuda"
    try:
        store, own, size = next(rendezvous("env://", timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=PrefixStore("group", store), rank=own, world_size=size, timeout=TIMEOUT)
    except (dist.DistError, RuntimeError) as error:
        raise StorageError(f"the other ranks cannot be reached: {str(error).splitlines()[0]}") from error
    try:
        yield
        _leave_together(store, own, size)
    except CosmosError as error:
        if error.exit_code != EXIT_LOST:
            _leave_together(store, own, size)
        raise
    finally:
        dist.destroy_process_group()


def _leave_together(store: Store, own: int, size: int) -> None:
    """Wait until every rank is about to leave: a broadcast fails on the rank that gives where the one that receives is
    already gone.

    By way of the store, since every collective ends like that broadcast. Ranks that do not come are not waited for.
    """
    with suppress(dist.DistError, RuntimeError):  # the rank that keeps the store may be the first to go
        store.set(f"left/{own}", "")
        store.wait([f"left/{other}" for other in range(size)], LEAVING)


@contextmanager
def as_run_errors() -> Iterator[None]:
    """Raise OSError as lost storage, and a broken collective as a lost rank: starting again may mend either.

    Raises StorageError for them, and TrainingError for what calls ``sys.exit``: it has not ended as a run does.
    """
    try:
        yield
    except SystemExit as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise TrainingError(
            f"{frame.filename}:{frame.lineno} called sys.exit({error.code}) in the midst of the run"
        ) from error
    except OSError as error:
        raise StorageError(f"storage failed: {error}") from error
    except Exception as error:
        if not is_lost_rank(error):
            raise
        raise StorageError(f"another rank was lost: {str(error).splitlines()[0]}") from error


class World:
    """This process's place among the ranks of a run, and what they tell one another about it (by way of the host)."""

    def __init__(self) -> None:
        self.rank = rank()
        self.size = world_size()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over ranks."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with collective_time.during(numbers):
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return cast(list[float], numbers.tolist())

    def mean(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The mean of each number over ranks; all ranks give the same names."""
        if self.size == 1:
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(numbers, (values / self.size).tolist(), strict=True))

    def slowest(self, seconds: float) -> dict[str, float]:
        """The rank with the most ``seconds`` of work of its own, and by how much of the mean it exceeds that; nothing
        for one rank.
        """
        if self.size == 1:
            return {}
        all_seconds = gather_objects(seconds)
        most, mean = max(all_seconds), sum(all_seconds) / self.size
        return {"slowest_rank": all_seconds.index(most), "slowest_rank_lag": most / mean - 1}

    def run_on_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first rank, on all; an error of ours that it raises there is raised on all."""
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]
        error: BaseException | None = None
        if self.first:
            try:
                told[0] = make()
            except CosmosError as caught:
                error = told[1] = caught
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise error or told[1]
        return cast(T, told[0])


def pick_device(wanted: str) -> torch.device:
    """The device of this process for ``training.device``. Raises UserError where it is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "training.device: cuda was asked for, and this machine has no CUDA device. Set it to auto or cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def be_deterministic() -> None:
    """Refuse every CUDA kernel whose result depends on timing (``training.deterministic``); before CUDA's first use."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step instead of giving it back, for training on the CPU.

    A step allocates the same activations again and again; fetched anew from the kernel they come as zeroed pages,
    one fault each. Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 28)
