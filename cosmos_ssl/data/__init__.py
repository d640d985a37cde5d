"""The way of a sample to a batch, and nothing else: shards (``tar``, ``scan``, ``manifest``, ``dataset``), folders
of pictures and tables by index, their order, the loader and its workers; bytes by ``storage``, what is kept by
``cache``.

Imports the contract (``api``) and what stands before it; work on shards beside training is in ``cosmos_ssl.shards``.
"""

from cosmos_ssl.data.budget import BadSampleBudget, Replacement
from cosmos_ssl.data.captions import caption_schema, check_captions, join_sentences, split_sentences
from cosmos_ssl.data.dataset import Shards, open_shards
from cosmos_ssl.data.folder import Folder
from cosmos_ssl.data.loader import LoadedBatch, Loader
from cosmos_ssl.data.manifest import Manifest, load_manifest
from cosmos_ssl.data.order import Order, sample_rng
from cosmos_ssl.data.scan import expand
from cosmos_ssl.data.table import TableData

__all__ = [
    "BadSampleBudget",
    "Folder",
    "LoadedBatch",
    "Loader",
    "Manifest",
    "Order",
    "Replacement",
    "Shards",
    "TableData",
    "caption_schema",
    "check_captions",
    "expand",
    "join_sentences",
    "load_manifest",
    "open_shards",
    "sample_rng",
    "split_sentences",
]
