"""Pictures in folders: ``dataset`` reads them by index, ``index`` knows which there are, ``content`` their bytes."""

from cosmos_ssl.data.folder.dataset import Folder, folder_notices, picture_folder, splits_of
from cosmos_ssl.data.folder.index import EXTENSIONS, load_folder, similar

__all__ = ["EXTENSIONS", "Folder", "folder_notices", "load_folder", "picture_folder", "similar", "splits_of"]
