"""How many ranks there are, and how many can share a batch; read before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cosmos_ssl.config import Config
from cosmos_ssl.errors import ConfigError, UserError
from cosmos_ssl.registry import shown

_HOW = "Start ranks by torchrun, srun or profile.nproc, or unset these variables"
_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")


def started_ranks() -> int:
    """Ranks of the world that torchrun, srun or cosmos-launch started this process in; 1 outside of one.

    Raises UserError where the variables that tell it are set in part, or make no sense.
    """
    _number("LOCAL_RANK", 0)
    if "WORLD_SIZE" in os.environ:
        return _ranks("WORLD_SIZE", "RANK", ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if "RANK" in os.environ:
        raise UserError(f"RANK is set ({os.environ['RANK']}), and WORLD_SIZE is not. {_HOW}")
    if "SLURM_STEP_ID" in os.environ and "SLURM_NTASKS" in os.environ:
        return _ranks("SLURM_NTASKS", "SLURM_PROCID", _SRUN)
    return 1


def _ranks(size: str, rank: str, needed: Sequence[str]) -> int:
    """The number of ranks that the variable ``size`` tells. Several ranks need all the variables in ``needed``."""
    ranks = _number(size, 1) or 1
    own = _number(rank, 0)
    if own is not None and own >= ranks:
        raise _fault(rank, f"a number below {size} ({ranks})")
    if ranks > 1:
        missing = [name for name in needed if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"{size} is set ({ranks}), and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not. {_HOW}"
            )
        _number("MASTER_PORT", 1, 65_535)
        _number("SLURM_LOCALID", 0)
        _number("SLURM_JOB_NUM_NODES", 1)
    return ranks


def _number(name: str, least: int, most: int = 10**9) -> int | None:
    """The number in a variable, None where it is not set. Raises UserError."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and least <= int(text[:12]) <= most):
        raise _fault(
            name, f"a whole number from {least} on" if most == 10**9 else f"a whole number from {least} to {most:,}"
        )
    return int(text)


def _fault(name: str, wanted: str) -> UserError:
    return UserError(f"the environment variable {name} is {shown(os.environ[name])}, expected {wanted}. {_HOW}")


def possible_ranks(config: Config) -> list[int]:
    """The numbers of ranks that can share the batch: they divide the lanes, and micro-batches divide a rank's share."""
    batch, micro = config.training.batch_size, config.training.micro_batch_size or 1
    return [ranks for ranks in range(1, config.lanes + 1) if config.lanes % ranks == 0 and batch // ranks % micro == 0]


def shards(config: Config, ranks: int) -> int:
    """How many of ``ranks`` share one copy of the weights (``training.parallel``); 1 where each holds all.

    Raises ConfigError where that cannot be.
    """
    kind, given = config.training.parallel, config.training.parallel_shards
    if given is not None and kind != "hsdp":
        raise ConfigError(
            [
                f"training.parallel_shards: with training.parallel={kind} "
                f"{'all ranks share one copy' if kind == 'fsdp' else 'no rank shares its copy'}. "
                "Leave it out, or set training.parallel=hsdp"
            ]
        )
    if kind != "replicate" and config.training.compile:
        raise ConfigError(
            [
                f"training.compile: not with training.parallel={kind}, which lays the weights of a block anew around "
                "each of its calls, while compiled code expects them where they were. Leave one out"
            ]
        )
    if kind == "replicate" or ranks == 1:
        return 1
    if kind == "fsdp":
        return ranks
    found = given or _number("LOCAL_WORLD_SIZE", 1) or ranks // (_number("SLURM_JOB_NUM_NODES", 1) or 1)
    if found > ranks or ranks % found:
        possible = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ConfigError(
            [
                f"training.parallel_shards: {ranks} ranks cannot be divided into copies of {found} ranks each. "
                f"Possible: {possible}."
            ]
        )
    return found


def check_ranks(config: Config, ranks: int) -> None:
    """Raise ConfigError, with the possible numbers, unless ``ranks`` can share the batch and the weights."""
    shards(config, ranks)
    possible = possible_ranks(config)
    if ranks not in possible:
        micro = config.training.micro_batch_size
        means = f"loader.lanes: {config.lanes}" + (f", training.micro_batch_size: {micro}" if micro else "")
        listed = ", ".join(map(str, possible))
        raise ConfigError(
            [
                f"training.batch_size: {config.training.batch_size} cannot be shared by {ranks} ranks ({means}). "
                f"Possible: {listed}."
            ]
        )
