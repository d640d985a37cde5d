"""Training data in tables of pictures and captions, without making shards first."""

from __future__ import annotations

from dataclasses import replace

from cosmos_ssl.api import Aside, Location, Spec
from cosmos_ssl.data.round_robin import RoundRobinShards
from cosmos_ssl.data.table import Columns, TableData, is_table


class Table(RoundRobinShards, TableData):
    """Rows of Parquet, CSV, TSV or JSON-lines files, or of a folder that Hugging Face's ``save_to_disk`` wrote.

    ``train_data`` names the tables (braces, ``*``, ``::`` between several).
    ``image_column`` holds paths of pictures, their bytes, or ``{bytes, path}``; left out, it is told by its name
    (``image``, ``path``, ``file_name``, ...).
    ``caption_columns`` hold a text, cut at sentence ends, or a list of sentences; left out, they are those that are
    called caption, text or the like. ``label_column`` holds classes.
    ``image_root`` is the folder that paths start from; left out, that of each table.
    ``validation_data`` is for evaluators that name no data: tables with the same columns, shards or a folder.
    ``cache_dir`` holds the index and rows as mapped Arrow files, of tables with pictures in them those, too; without it
    they lie beside the first table or in the user's cache folder. Pictures of more than ``max_pixels`` are bad samples.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        train_data: Location | list[Location],
        image_column: str | None = None,
        caption_columns: list[str] | None = None,
        label_column: str | None = None,
        image_root: Location | None = None,
        validation_data: Location | None = None,
        cache_dir: Aside[str | None] = None,
        max_pixels: int = 1 << 26,
    ) -> None:
        if max_pixels < 1:
            raise ValueError(f"max_pixels: {max_pixels} leaves no picture")
        if caption_columns is not None and not (caption_columns and all(caption_columns)):
            raise ValueError("caption_columns: an empty list or name leaves no captions; leave it out to find them")
        texts = bool(spec.text_views) or not spec.image_views
        columns = Columns(
            image_column=image_column,
            caption_columns=(None if caption_columns is None else tuple(caption_columns)) if texts else (),
            label_column=label_column,
            image_root=image_root,
        )
        own = replace(columns, label_column=label_column or "")  # what is not asked for is not looked for
        super().__init__(train_data, columns=own, texts=texts, cache_dir=cache_dir, max_pixels=max_pixels)
        tables = validation_data is not None and is_table(validation_data)
        self.validation_data = columns.address(validation_data or "") if tables else validation_data

    def place(self, index: int) -> int:
        """Where sample ``index`` stands in the tables: pictures in the table itself are read with their neighbors."""
        place = super().place(index)
        return index if self.index.embedded else place
