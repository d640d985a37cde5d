"""From published caption tables and their images to training shards."""

from cosmos_ssl.shards.prepare.fetch import FetchOptions, fetch
from cosmos_ssl.shards.prepare.pipeline import PRESETS, Counts, Prepare, PrepareOptions, schema_beside

__all__ = ["PRESETS", "Counts", "FetchOptions", "Prepare", "PrepareOptions", "fetch", "schema_beside"]
