"""How many ranks there are, and how many can share a batch; read before anything heavy is imported."""

from __future__ import annotations

import os

from cosmos_ssl.config import Config
from cosmos_ssl.errors import ConfigError


def started_ranks() -> int:
    """Ranks of the world that torchrun, srun or cosmos-launch started this process in; 1 outside of one."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def possible_ranks(config: Config) -> list[int]:
    """The numbers of ranks that can share the batch: they divide the lanes, and micro-batches divide a rank's share."""
    batch, micro = config.training.batch_size, config.training.micro_batch_size or 1
    return [ranks for ranks in range(1, config.lanes + 1) if config.lanes % ranks == 0 and batch // ranks % micro == 0]


def check_ranks(config: Config, ranks: int) -> None:
    """Raise ConfigError, with the possible numbers, unless ``ranks`` can share the batch."""
    possible = possible_ranks(config)
    if ranks not in possible:
        micro = config.training.micro_batch_size
        means = f"loader.lanes: {config.lanes}" + (f", training.micro_batch_size: {micro}" if micro else "")
        listed = ", ".join(map(str, possible))
        raise ConfigError(
            [f"training.batch_size: {config.training.batch_size} cannot be shared by {ranks} ranks ({means}). Possible: {listed}."]
        )
