"""The default data set: procedural scenes (``pictures``), written once as real shards (``writing``), the same on every
run.
"""

from cosmos_ssl.data.scenes.pictures import CLASS_NAMES
from cosmos_ssl.data.scenes.writing import SceneOptions, default_folder, is_written, write_scenes

__all__ = ["CLASS_NAMES", "SceneOptions", "default_folder", "is_written", "write_scenes"]
