"""Tables of pictures and captions: ``address`` finds their files, ``files`` reads what is no Arrow file, ``rows`` maps
rows, ``index`` keeps what ``content`` found, ``dataset`` reads them by index.
"""

from cosmos_ssl.data.table.address import Columns, is_table, tables_of
from cosmos_ssl.data.table.dataset import TableData, table_notices

__all__ = ["Columns", "TableData", "is_table", "table_notices", "tables_of"]
