"""What the first steps of a run tell of all of it: its rate, its memory, and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cosmos_ssl.config import Config
from cosmos_ssl.engine.assembly import total_steps
from cosmos_ssl.engine.memory import fitting, owners, peak_and_room
from cosmos_ssl.engine.trainer import Trainer

_GIB = 2**30


class Rows:
    """A writer that keeps the rows of logged steps, each with its ``step``."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep one."""
        self.rows.append({"step": step, **values})

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Nothing: there are no evaluations."""

    def sync(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


def measured(config: Config, trainer: Trainer, rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """What to show of a trained probe of ``config``: title and text of each line; nothing but on the first rank.

    The steps up to the first of several rows are left out of all rates: caches are cold, kernels are compiled.
    """
    if not trainer.world.first:
        return []
    batch, ranks, on_cuda = config.training.batch_size, trainer.world.size, trainer.device.type == "cuda"
    begins = [0, *(int(row["step"]) for row in rows)]
    timed = list(zip(rows, begins, strict=False))[1:] or list(zip(rows, begins, strict=False))
    seconds = [(row["step"] - begin) * batch / row["samples_per_second"] for row, begin in timed]
    rate = (timed[-1][0]["step"] - timed[0][1]) * batch / sum(seconds)

    def share(name: str) -> str:
        weighted = sum(row.get(name, 0.0) * each for (row, _), each in zip(timed, seconds, strict=True))
        return f"{weighted / sum(seconds):.0%}"

    spread = f"{ranks} ranks" if ranks > 1 else "1 rank"
    steps = f"steps {timed[0][1] + 1:,} to {int(timed[-1][0]['step']):,}"
    lines = [("speed", f"{rate:,.1f} samples/s on {spread}, {batch / rate:.3f} s a step ({steps})")]
    if "mfu" in timed[-1][0]:
        lines.append(("mfu", share("mfu")))
    waits = f"data wait {share('data_wait')}" + (f", gpu wait {share('gpu_wait')}" if on_cuda else "")
    lines += [("waits", waits), ("memory", _memory(config, trainer, rows))]
    total = total_steps(config, trainer.order)
    hours = total * batch / rate / 3600
    each = "GPU-hours" if on_cuda else "rank-hours"
    digits = 1 if hours >= 1 else 4
    length = f"{total:,} steps of {batch:,} samples: {hours:,.{digits}f} hours, {hours * ranks:,.{digits}f} {each}"
    return [*lines, ("the whole run", f"{length}, without evaluations and checkpoints")]


def _memory(config: Config, trainer: Trainer, rows: Sequence[Mapping[str, float]]) -> str:
    """The peak, on the fullest rank of a CUDA device, and how many samples would fit there."""
    peak, room = peak_and_room(trainer.device)
    if trainer.device.type != "cuda":
        return (
            f"{peak / _GIB:.2f} GiB at most in the first rank's process, of the {room / _GIB:.1f} GiB of this machine"
        )
    assert trainer.run is not None, "a probe that has run"
    peak = int(max(row["memory"] for row in rows) * _GIB)
    kept = sum(size for owner, size in owners(trainer.run.state).items() if owner != "gradients")
    share = config.training.batch_size // trainer.world.size
    samples = min(share, config.training.micro_batch_size or share)
    fits = f"{fitting(samples, peak, kept, room):,} would fit (training.micro_batch_size, or batch_size over ranks)"
    return f"{peak / _GIB:.1f} of {room / _GIB:.1f} GiB at most, with {samples:,} samples a rank at once; about {fits}"
