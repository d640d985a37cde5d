"""From a config to a run (``runs``, ``readiness``), and from a checkpoint to its uses (``reading``, ``uses``,
``evaluate``, ``weights``); both by way of ``builder``, which makes objects of a config. May import all but testing and
cli.
"""

from cosmos_ssl.build.builder import Builder, meta_device
from cosmos_ssl.build.reading import load
from cosmos_ssl.build.runs import check, claim, make_trainer, probe, run, train

__all__ = [
    "Builder",
    "check",
    "claim",
    "load",
    "make_trainer",
    "meta_device",
    "probe",
    "run",
    "train",
]
