"""``cosmos-ssl flops --card``: a whole step counted on a CUDA device that is not there, and what it would take."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.common import number_table, table, write_json
from cosmos_ssl.config import Config, load_config
from cosmos_ssl.errors import EXIT_DONE, DataError

if TYPE_CHECKING:
    from cosmos_ssl.cost.card_step import CardStep
    from cosmos_ssl.cost.cards import Estimate
    from cosmos_ssl.engine.assembly import Assembly
    from cosmos_ssl.engine.cards import Card

SAMPLES = 64
_SHOWN = 12
"""Places of waits and copies."""


def report(arguments: argparse.Namespace) -> int:
    """Count a step of each config and print what it takes on ``arguments.card``. Raises UserError."""
    ranks, samples = arguments.ranks or 1, arguments.samples or SAMPLES
    configs = [load_config(config, arguments.overrides).config for config in arguments.configs]
    from cosmos_ssl.cost.cards import estimate
    from cosmos_ssl.cost.fake_device import fake_device
    from cosmos_ssl.engine.cards import CARDS

    card, rows = CARDS[arguments.card], []
    with fake_device() as run:
        for name, config in zip(arguments.configs, configs, strict=True):
            step, data = run(_counted, name, arguments.overrides, samples, arguments.caption_tokens, ranks)
            found, length = estimate(step, card), _length(config, data)
            _print(config, step, found, card, length)
            hours = length / (found.samples_per_s * ranks) / 3600 if length else None
            row = {"config": name, "name": config.name, "card": arguments.card, "samples": samples, "ranks": ranks}
            row |= {"precision": step.precision, "caption_tokens": arguments.caption_tokens or 19.5, **asdict(found)}
            row |= {
                "hours": hours,
                "gpu_hours": hours and hours * ranks,
                "stages": {s.name: asdict(s) for s in found.stages},
            }
            rows.append(row | {"waits": _places(step.found.waits), "copies": _places(step.found.pageable)})
    if arguments.json:
        write_json(arguments.json, rows[0] if len(rows) == 1 else rows)
    return EXIT_DONE


def _counted(
    config: str, overrides: Sequence[str], samples: int, caption_tokens: float | None, ranks: int
) -> tuple[CardStep, int | None]:
    """In the process with the device: the step of a config, and the samples of its data set if it is indexed here."""
    from cosmos_ssl.build import Builder
    from cosmos_ssl.cost.card_step import count_step
    from cosmos_ssl.cost.cards import NODE

    fixed = ["evaluators=null", f"training.batch_size={samples * ranks}", "loader.lanes=null"]
    loaded = load_config(config, [*overrides, *fixed])
    if loaded.config.training.parallel == "hsdp" and loaded.config.training.parallel_shards is None:
        loaded = load_config(config, [*overrides, *fixed, f"training.parallel_shards={min(NODE, ranks)}"])
    assembly = Builder(loaded).assemble("measure")
    options: dict[str, Any] = {"samples": samples, "caption_tokens": caption_tokens, "ranks": ranks}
    return count_step(assembly, loaded.config, **options), _indexed(assembly)


def _indexed(assembly: Assembly) -> int | None:
    from cosmos_ssl.api import IndexedDataset

    dataset = assembly.dataset
    try:
        known = isinstance(dataset, IndexedDataset) and dataset.check_exists() and dataset.is_indexed
    except (DataError, OSError):  # an example's shards, or those of another machine
        return None
    return int(dataset.shard_sizes.sum()) if known and dataset is not None else None


def _length(config: Config, data: int | None) -> int | None:
    """Samples of the whole run, as far as they are known."""
    most = config.schedule.max_steps and config.schedule.max_steps * config.training.batch_size
    return min(filter(None, (most, data and data * config.schedule.epochs)), default=None)


def _places(events: Counter[Any]) -> list[dict[str, Any]]:
    """The places that made the host wait or copied, the most frequent first."""
    return [event._asdict() | {"count": count} for event, count in events.most_common()]


def _print(config: Config, step: CardStep, found: Estimate, card: Card, length: int | None) -> None:
    from cosmos_ssl.cost import cards
    from cosmos_ssl.engine.cards import USABLE

    where = f"rank {step.rank} of {step.ranks}, each on " if step.ranks > 1 else ""
    print(f"{config.name}: a step of {step.samples} samples in {step.precision} on {where}one {card.name}")
    print(f"Counted on a device that is not there; attention by {step.attention}, not compiled. Times are estimates.")
    heads = ["LAUNCHES", "GB MOVED", "TFLOP", "PEAK GIB", "MS"]
    rows = {s.name: [s.launches, s.gigabytes, s.teraflops, s.peak_gib, s.ms] for s in found.stages}
    total = [found.launches, found.gigabytes, found.teraflops, found.peak_gib, found.step_ms]
    number_table("STAGE", heads, rows | {"total": total})
    print()
    gib = 2**30
    fits = f"{found.micro_batch:,} samples fit into {USABLE * card.gib:.0f} of its {card.gib:.0f} GiB"
    lines = [
        (
            "speed",
            f"{found.samples_per_s:,.0f} samples/s a card, MFU {found.mfu:.0%}; "
            f"the host takes {found.host_ms:.0f} ms to launch it",
        ),
        (
            "memory",
            f"{step.state / gib:.2f} GiB between steps, {step.per_sample / gib:.3f} GiB more for each sample: {fits}",
        ),
        ("run", _run(found, step.ranks, length)),
        ("loader", f"{found.loader_cores:.1f} cores a card, at {1e3 * cards.LOADER_SECONDS:g} ms of one core a sample"),
    ]
    if step.ranks > 1:
        lines.append(("network", f"{found.sent_gigabytes:.2f} GB sent by each rank"))
    for title, count, events in (
        ("host waits", found.host_waits, step.found.waits),
        ("copies from memory that is not pinned", found.pageable_copies, step.found.pageable),
    ):
        lines.append((title, f"{count}"))
        lines += [("", f"{n} x {e.where} ({e.stage})") for e, n in events.most_common(_SHOWN)]
    if step.found.uncounted:
        lines.append(("not counted", ", ".join(step.found.uncounted)))
    print(table(lines), end="")
    print(*cards.ASSUMPTIONS, sep="\n")


def _run(found: Estimate, ranks: int, length: int | None) -> str:
    """Hours and GPU-hours of the whole run, or of a million samples where its length is not known."""
    hours = (length or 1_000_000) / (found.samples_per_s * ranks) / 3600
    what = f"all {length:,} samples of it" if length else "a million samples (its data are not indexed here)"
    return f"{what}: {hours:,.1f} hours, {hours * ranks:,.1f} GPU-hours"
