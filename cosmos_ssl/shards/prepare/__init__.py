"""From published caption tables and their images to training shards: the command ``cosmos-ssl data prepare``.

``pipeline`` is the whole way; tables are stored as rows, images indexed, both joined by hashed names, shards written.
"""

from cosmos_ssl.shards.prepare.fetch import FetchOptions, fetch
from cosmos_ssl.shards.prepare.pipeline import Counts, Preparation, PrepareOptions

__all__ = ["Counts", "FetchOptions", "Preparation", "PrepareOptions", "fetch"]
