"""The small model of a check on several ranks, forks of this process: what they find is held against one rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from cosmos_ssl.engine.distributed import World
from cosmos_ssl.engine.step import Gradients
from cosmos_ssl.errors import listed
from cosmos_ssl.testing.examples import PROGRESS, SAMPLES
from cosmos_ssl.testing.model import ModelCheck, expect, move

STEPS = 2
PATIENCE = timedelta(seconds=60)
"""How long a rank waits for what another one does not do."""


def check_ranks(check: ModelCheck, path: str, ranks: int) -> None:
    """Hold steps on ``ranks`` ranks, which share the batch, against the same steps on one: the losses, the gradients,
    and the buffers of the part under ``path``, which agree over ranks to the bit.

    Where the step draws random numbers, which each rank does for itself, only buffers are held against one another.
    """
    expect(ranks > 1 and SAMPLES % ranks == 0, f"ranks: {ranks} do not share a batch of {SAMPLES}: take 2 or 3")
    alone = _steps(check, path)
    with TemporaryDirectory() as folder:
        given = (ranks, folder, lambda: _steps(check, path))
        start_processes(_rank, given, ranks, start_method="fork")
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    failed = [(rank, told["error"]) for rank, told in enumerate(found) if "error" in told]
    expect(not failed, f"on {ranks} ranks, where one does: {'; '.join(f'rank {r}: {e}' for r, e in failed)}")
    apart = [
        name
        for name, value in found[0].items()
        if name.startswith("buffer ") and any(not torch.equal(value, other[name]) for other in found)
    ]
    expect(
        not apart,
        f"ranks move their {listed(apart, limit=3)} apart: move it by what all ranks share (all_sum, "
        "Need(gathered=True)), or register it with persistent=False",
    )
    again = _steps(check, path, seed=1)
    if any(not torch.equal(value, again[name]) for name, value in alone.items()):
        return  # it draws random numbers
    rounding = 1e-5 * max(_most(value) for name, value in alone.items() if name.startswith("gradient "))
    wrong = [name for name, value in alone.items() if not _close(value, found[0][name], rounding)]
    told = f"{ranks} ranks that share a batch find other than one: {listed(wrong, limit=3)}"
    expect(
        not wrong,
        f"{told}. Terms are means over this rank's samples, and what reaches over samples is asked for with "
        "Need(gathered=True) or done by cosmos_ssl.functional",
    )


def _close(alone: Tensor, together: Tensor, rounding: float) -> bool:
    """Whether both are the same but for ``rounding``, which is all that is left of a gradient that batch norm takes
    away.
    """
    return torch.allclose(alone.double(), together.double(), rtol=2e-3, atol=max(2e-4 * (_most(alone) or 1), rounding))


def _most(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _steps(check: ModelCheck, path: str, seed: int = 0) -> dict[str, Tensor]:
    """What a rank finds in some steps on its share of the batch, by names for people; losses are means over ranks."""
    world, assembly = World(), check.build(seed)
    share = SAMPLES // world.size
    views = check.views.slice(world.rank * share, (world.rank + 1) * share)
    assembly.start_teacher()
    assembly.model.train()
    part = assembly.model.get_submodule(path)
    step, found = Gradients(assembly), dict[str, Tensor]()
    for number in range(STEPS):
        logs = step(views, PROGRESS).logs
        means = world.mean({name: float(x) for name, x in logs.items() if name.startswith("loss")})
        found |= {f"{name} of step {number + 1}": torch.tensor(x) for name, x in means.items()}
        gradients = {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}
        found |= {f"gradient of {n} in step {number + 1}": grad for n, grad in gradients.items()}
        move(assembly.model)
        assembly.teacher.update(assembly.followed, PROGRESS)
    trained = {name for name, _ in part.named_parameters()}
    state = part.state_dict().items()
    return found | {f"buffer {name}": x.detach().clone() for name, x in state if name not in trained}


def _rank(rank: int, ranks: int, folder: str, work: Callable[[], dict[str, Any]]) -> None:
    """Leave in ``folder`` what this rank found, or the error that it met."""
    torch.set_num_threads(1)  # those of the process that was forked are not there
    dist.init_process_group("gloo", f"file://{folder}/store", PATIENCE, ranks, rank)
    try:
        told = work()
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"}
    torch.save(told, Path(folder) / f"{rank}.pt")
    if "error" not in told:
        dist.destroy_process_group()
