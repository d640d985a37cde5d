"""From a config to a running job: the named parts are imported, checked, built and wired together."""

from cosmos_ssl.build.builder import Builder, meta_device
from cosmos_ssl.build.runs import check, claim, load, make_augmenters, make_trainer, run, train, watched

__all__ = [
    "Builder",
    "check",
    "claim",
    "load",
    "make_augmenters",
    "make_trainer",
    "meta_device",
    "run",
    "train",
    "watched",
]
