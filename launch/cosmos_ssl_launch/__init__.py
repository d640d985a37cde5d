"""The ``cosmos-launch`` command: trains what a config says, on this machine (``launch``, ``local``) or on a SLURM
cluster (``slurm``, ``job``, ``requeue``, ``snapshot``), by a ``profile``; ``commands`` on run folders. Of the core it
imports errors, files, streams, registry, config, build and cli.
"""

from cosmos_ssl_launch.launch import main

__all__ = ["main"]
