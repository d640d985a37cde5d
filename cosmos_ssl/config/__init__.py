"""From YAML (``source``) to a checked config (``loading``, ``sections``), the ranks that can share it, its JSON Schema.

This is the first stage, which imports no part: their options are checked in the second, ``build``. Imports the
registry, and never torch.
"""

from cosmos_ssl.config.loading import NAMED_GROUPS, SINGLE_PARTS, LoadedConfig, load_config, part_paths
from cosmos_ssl.config.sections import (
    CheckpointsConfig,
    Config,
    OptimizerConfig,
    RuleConfig,
    ScheduleConfig,
    TrainingConfig,
)

__all__ = [
    "NAMED_GROUPS",
    "SINGLE_PARTS",
    "CheckpointsConfig",
    "Config",
    "LoadedConfig",
    "OptimizerConfig",
    "RuleConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "load_config",
    "part_paths",
]
