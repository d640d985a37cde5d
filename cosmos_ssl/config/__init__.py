"""The config: every section with its keys, types and defaults, and how a YAML file becomes one.

Options of parts are not here: they are the arguments of the part's constructor, checked in a second stage
(``build``) that imports the parts. The first stage, ``load_config``, imports none.
"""

from cosmos_ssl.config.loading import NAMED_GROUPS, SINGLE_PARTS, LoadedConfig, load_config, locate, part_paths
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
    "locate",
    "part_paths",
]
