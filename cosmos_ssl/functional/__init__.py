"""Losses over the global batch and the collectives behind them, for authors of losses.

One process is the world of size one: the same functions, no communication. With several ranks each
computes the rows of its own samples only; the few views of one side are gathered (by the engine, for
every ``Need`` with ``gathered=True``), and the other direction costs one sum of exponentials.

Shape letters: V, U views; B samples on this rank; N samples of all ranks; D width.
"""

from cosmos_ssl.functional.collectives import all_max, all_sum, gather, gather_many, gather_objects, rank, world_size
from cosmos_ssl.functional.losses import info_nce, sigmoid_loss
from cosmos_ssl.functional.placement import is_sharded, laid_out, local, whole
from cosmos_ssl.functional.positions import sincos_positions
from cosmos_ssl.functional.upload import upload
from cosmos_ssl.liveness import alive

__all__ = [
    "alive",
    "all_max",
    "all_sum",
    "gather",
    "gather_many",
    "gather_objects",
    "info_nce",
    "is_sharded",
    "laid_out",
    "local",
    "rank",
    "sigmoid_loss",
    "sincos_positions",
    "upload",
    "whole",
    "world_size",
]
