"""Where a process stands: its device and memory, its place among the ranks, and what ranks tell one another."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _abort_process_group, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from cosmos_ssl.config.ranks import started_ranks
from cosmos_ssl.errors import EXIT_LOST, CosmosError, StorageError, TrainingError, UserError, is_lost_rank
from cosmos_ssl.functional import gather_objects, rank, world_size
from cosmos_ssl.functional.collective_time import collective_time
from cosmos_ssl.functional.together import from_first

T = TypeVar("T")

STARTING = timedelta(minutes=30)
"""How long a rank waits for the others until the first step has ended: caches are cold, kernels are compiled."""

RUNNING = timedelta(minutes=15)
"""How long it does from then on: longer than a save, or all attempts at a read of storage that stalls, take."""

SHARING = timedelta(days=1)
"""How long one that embeds or evaluates waits for another, whose share may take longer, above all where an earlier
start has done more of its own; one that has died is noticed at once.
"""

LEAVING = timedelta(seconds=4)
"""How long a rank that has ended waits for the others to end."""

ABORTING = 5.0
"""Seconds that breaking off what is under way on the device may take."""

_NEW_NAMES = hasattr(torch._C, "_accelerator_setAllocatorSettings")  # of PyTorch's variables, since 2.9
_FLIGHTS = "TORCH_FR_DUMP_TEMP_FILE" if _NEW_NAMES else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


@contextmanager
def joined_world(device: str, folder: Path | None = None, *, wait: timedelta = STARTING) -> Iterator[None]:
    """Be a member of the started world while entered: gloo for host tensors, NCCL for those on CUDA devices.

    ``wait``: so long a rank waits for another once all have met. What NCCL's flight recorder holds when ranks wait too
    long goes into ``folder``. One that fails leaves at once, all others together. Raises UserError where the variables
    that tell of the world make no sense, or the ranks cannot have a device each, StorageError where the others cannot
    be reached.
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
    try:
        store, own, size = next(rendezvous("env://", timeout=STARTING))
        backend = "gloo"
        if agree_on_device(device, store, own, size).type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            _record_flights(folder)
        group = PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=own, world_size=size, timeout=wait)
    except UserError:  # on all ranks; one of them keeps the store
        _leave_together(store, own, size)
        raise
    except (dist.DistError, RuntimeError) as error:
        raise StorageError(f"the other ranks cannot be reached: {str(error).splitlines()[0]}") from error
    together = False
    try:
        yield
        together = _leave_together(store, own, size)
    except CosmosError as error:
        together = error.exit_code != EXIT_LOST and _leave_together(store, own, size)
        raise
    finally:
        (dist.destroy_process_group if together else _leave_alone)()


def agree_on_device(wanted: str, store: Store, own: int, size: int) -> torch.device:
    """The device of this rank for ``training.device``, once all have told theirs through the store.

    Raises UserError on all ranks alike where one finds none, some find none, or two would share one.
    """
    place = {"node": socket.gethostname(), "type": "cpu", "id": "", "fault": ""}
    device = torch.device("cpu")
    if wanted == "cpu":
        return device
    try:
        device = pick_device(wanted)
        place["type"] = device.type
        if device.type == "cuda":
            place["id"] = str(torch.cuda.get_device_properties(device).uuid)
    except UserError as error:
        place["fault"] = str(error)
    store.set(f"device/{own}", json.dumps(place))
    keys = [f"device/{other}" for other in range(size)]
    store.wait(keys, STARTING)
    places = [json.loads(text) for text in store.multi_get(keys)]
    names = [f"rank {other} ({each['node']})" for other, each in enumerate(places)]
    for name, each in zip(names, places, strict=True):
        if each["fault"]:
            raise UserError(f"{name}: {each['fault']}")
    kinds = [each["type"] for each in places]
    if len(set(kinds)) > 1:
        none, one = names[kinds.index("cpu")], names[kinds.index("cuda")]
        raise UserError(
            f"training.device: {none} finds no CUDA device, and {one} has one. Leave that node out, or set it to cpu"
        )
    taken: dict[tuple[str, str], str] = {}
    for name, each in zip(names, places, strict=True):
        other = taken.setdefault((each["node"], each["id"]), name)
        if each["id"] and other != name:
            raise UserError(f"{other} and {name} would share one CUDA device. Start one rank a device")
    return device


def _record_flights(folder: Path | None) -> None:
    """Have NCCL's flight recorder write down the last collectives of every rank where one waits too long."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE" if _NEW_NAMES else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if folder is not None:
        os.environ.setdefault(_FLIGHTS, str(folder.absolute() / "nccl_rank"))


def dump_flights() -> str:
    """Write what NCCL's flight recorder of this rank holds to its file; where that lies, for people, else nothing."""
    if _FLIGHTS not in os.environ:
        return ""
    path = Path(f"{os.environ[_FLIGHTS]}{rank()}")
    if hasattr(torch._C._distributed_c10d, "_dump_nccl_trace"):  # with NCCL
        with suppress(OSError, RuntimeError):
            path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
    return f"; the last collectives of this rank are in {path} (read by torch.distributed.flight_recorder)"


def be_impatient() -> None:
    """Wait for other ranks as long as a run's steps need: the first one has ended."""
    if world_size() > 1:
        _set_pg_timeout(RUNNING)


def _leave_alone() -> None:
    """Break off what is under way: others may never come, and NCCL would wait for them."""

    def abort() -> None:
        with suppress(RuntimeError):
            _abort_process_group()

    leaving = threading.Thread(target=abort, daemon=True)
    leaving.start()
    leaving.join(ABORTING)


def _leave_together(store: Store, own: int, size: int) -> bool:
    """Wait until every rank is about to leave, and whether all are: a broadcast fails on the rank that gives where the
    one that receives is already gone.

    By way of the store, since every collective ends like that broadcast. Ranks that do not come are not waited for.
    """
    with suppress(dist.DistError, RuntimeError):  # the rank that keeps the store may be the first to go
        store.set(f"left/{own}", "")
        store.wait([f"left/{other}" for other in range(size)], LEAVING)
        return True
    return False


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
        raise StorageError(f"another rank was lost: {str(error).splitlines()[0]}{dump_flights()}") from error


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
        """Return what ``make`` returns on the first rank, on all; an error of ours or of storage that it raises there
        is raised on all.
        """
        return from_first(make)


def pick_device(wanted: str) -> torch.device:
    """The device of this process for ``training.device``. Raises UserError where it is not there.

    On CUDA memory is had in segments that grow, unless the user's variables say otherwise.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "training.device: cuda was asked for, and this machine has no CUDA device. Set it to auto or cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    own, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= count > 1:
        raise UserError(
            f"LOCAL_RANK is {own}, and this machine has {count} CUDA devices, one a rank. Start fewer ranks on it"
        )
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF" if _NEW_NAMES else "PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    device = torch.device("cuda", min(own, count - 1))  # a rank that is bound to its device may see that one alone
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
