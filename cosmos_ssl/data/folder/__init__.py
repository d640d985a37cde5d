"""Pictures in folders: ``dataset`` reads them by ``index``, which ``scan`` makes; ``content`` knows their bytes."""

from cosmos_ssl.data.folder.dataset import Folder, folder_notices, picture_folder, splits_of
from cosmos_ssl.data.folder.scan import EXTENSIONS, load_folder, similar

__all__ = ["EXTENSIONS", "Folder", "folder_notices", "load_folder", "picture_folder", "similar", "splits_of"]
