"""Memory of a run: whose it is, what fits, and what is said where there is not enough."""

from __future__ import annotations

import inspect
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from cosmos_ssl.config import Config
from cosmos_ssl.engine.accumulate import refuse_accumulation
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.cards import USABLE
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.errors import PluginError, TrainingError, first_line
from cosmos_ssl.functional import local

_SIGNS = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "Failed to CUDA calloc")
_GIB = 2**30


def record_allocations() -> None:
    """Have PyTorch note the last allocations on CUDA for a snapshot, without stacks, whose cost a step would feel."""
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", max_entries=100_000)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether memory was refused, of a device or the host (PyTorch has no one class for it)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


@contextmanager
def enough_memory(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Raise TrainingError, in the words of ``explain``, where memory is refused."""
    try:
        yield
    except Exception as error:
        refused = next((each for each in (error, error.__cause__) if is_out_of_memory(each)), None)
        if refused is None:
            raise
        raise TrainingError(explain(refused)) from error


def owners(state: RunState) -> dict[str, int]:
    """Bytes of all that a run holds between two steps, by what they are."""
    models = {role: [*model.parameters(), *model.buffers()] for role, model in state.models.items()}
    return {
        "parameters": _held(models["student"]),
        "gradients": _held(x.grad for x in models["student"] if x.grad is not None),
        "optimiser state": _held(state.optimizer.tensors().values()),
        "teacher": _held(models.get("teacher", [])),
    }


def _held(tensors: Iterable[Tensor]) -> int:
    """Bytes that this rank holds of them."""
    return sum(local(x).nbytes for x in tensors)


def peak_and_room(device: torch.device) -> tuple[int, int]:
    """The most bytes that this process has had in use lately, and those of the whole device, or of this machine."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device), total
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, pages


def fitting(samples: int, peak: int, kept: int, room: int) -> int:
    """Samples that a rank can probably encode at once, if ``samples`` come to ``peak`` bytes with the ``kept`` ones
    that lie there anyway.
    """
    return max(0, int(samples * (USABLE * room - kept) / max(peak - kept, 1)))


def explain_shortage(
    error: BaseException,
    assembly: Assembly,
    config: Config,
    state: RunState | None,
    device: torch.device,
    *,
    ranks: int,
    evaluating: str,
) -> str:
    """Say whose the memory is, and which settings take less; ``state`` None while a run starts, and
    ``evaluating`` an evaluator's name.
    """
    tried = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    where = "at the start" if state is None else f"in step {state.step + 1:,}"
    if state is not None and evaluating:
        where = f"in evaluators.{evaluating} after step {state.step:,}"
    told = f"out of memory on {device} {where}" + (f" (for {tried[1]} more)" if tried else f" ({first_line(error)})")
    peak, room = peak_and_room(device)
    known = owners(state) if state is not None else {}
    shares = sorted((known | {"activations and the rest": max(0, peak - sum(known.values()))}).items(), key=_bytes)
    told += f"; at most {peak / _GIB:.2f} of {room / _GIB:.1f} GiB were in use: "
    told += ", ".join(f"{owner} {size / _GIB:.2f}" for owner, size in shares) + ". "
    if evaluating:
        return f"{told}Set evaluators.{evaluating}=null, and evaluate the finished run: cosmos-ssl eval"
    share = config.training.batch_size // ranks
    samples = config.training.micro_batch_size or share
    most = min(samples // 2, fitting(samples, peak, sum(known.values()), room))
    further = ["a smaller training.batch_size", "more ranks", *_checkpointing(assembly, config)]
    if config.training.precision == "fp32" and device.type == "cuda":
        further.append("training.precision=amp_bf16")
    if samples == 1 or _refuses(assembly):
        return f"{told}What takes less: {', '.join(further)}"
    smaller = max(size for size in range(1, max(1, most) + 1) if share % size == 0)
    return (
        f"{told}Set training.micro_batch_size={smaller} ({samples} samples of a rank were encoded at once; the result "
        f"is the same). What takes less beside: {', '.join(further)}"
    )


def _bytes(item: tuple[str, int]) -> int:
    return -item[1]


def _refuses(assembly: Assembly) -> bool:
    try:
        refuse_accumulation(assembly)
    except PluginError:
        return True
    return False


def _checkpointing(assembly: Assembly, config: Config) -> list[str]:
    """The option of towers that have it, and have it not set."""
    found = []
    for modality, tower in assembly.model.towers.items():
        part = getattr(config.model, modality)
        offered = "grad_checkpointing" in inspect.signature(type(tower).__init__).parameters
        if offered and not (part and part.options.get("grad_checkpointing")):
            found.append(f"model.{modality}.grad_checkpointing=true")
    return found


def dump_memory(device: torch.device, path: Path) -> str:
    """Write what PyTorch knows of a CUDA device's memory to ``path``; where that lies, for people, else nothing."""
    if device.type != "cuda":
        return ""
    with suppress(OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        return f". A snapshot for https://docs.pytorch.org/memory_viz is {path}"
    return ""
