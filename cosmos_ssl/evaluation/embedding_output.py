"""Files of embeddings: Parquet, or NumPy with keys beside it; there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import UserError
from cosmos_ssl.evaluation.embedding_input import What
from cosmos_ssl.files import storage_faults, written_whole

FORMATS = (".parquet", ".npy")
_META = b"cosmos_ssl"
_ROW_GROUP = 16_384


class Row(NamedTuple):
    """What is known of one embedding."""

    key: str
    """Of the sample; of a text file the number of the line, from 1."""
    source: str
    modality: str
    text: str | None


Rows: TypeAlias = tuple[NDArray[Any], Sequence[Row]]
"""Vectors [n, D], and what is known of each."""


def check_output(output: Path, what: What) -> None:
    """Raise UserError for a file that these embeddings cannot be written to; make its folder."""
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: write to a file that ends in {' or '.join(FORMATS)}")
    if output.suffix == ".npy" and what == "both":
        raise UserError(
            f"--output {output}: an array cannot tell images from texts. Give a .parquet file, or --what image or text"
        )
    if output.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            way = "Run: pip install 'cosmos-ssl[eval]', or give a .npy file"
            raise UserError(f"--output {output}: Parquet needs pyarrow. {way}") from error
    with storage_faults(f"--output {output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)


def read_meta(output: Path) -> dict[str, Any] | None:
    """Return what was written as ``meta`` with a whole output; None where there is none.

    Raises UserError for a file of somebody else's.
    """
    if not output.exists():
        return None
    try:
        if output.suffix == ".parquet":
            from pyarrow import parquet

            return dict(json.loads((parquet.read_schema(output).metadata or {})[_META]))
        return dict(json.loads(output.with_suffix(".meta.json").read_bytes()))
    except (KeyError, TypeError, ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{output} exists and is no file of embeddings. Give another output, or --overwrite") from error


def write_embeddings(
    output: Path, parts: Iterator[Rows], shape: tuple[int, int], dtype: str, meta: Mapping[str, Any]
) -> None:
    """Write ``shape[0]`` vectors of ``shape[1]`` numbers to ``.parquet`` or ``.npy``; no half of it is ever there.

    Raises OSError.
    """
    write = _write_parquet if output.suffix == ".parquet" else _write_npy
    write(output, parts, shape, dtype, meta)


def _write_parquet(
    output: Path, parts: Iterator[Rows], shape: tuple[int, int], dtype: str, meta: Mapping[str, Any]
) -> None:
    """Columns ``key``, ``source``, ``modality``, ``text`` and ``embedding``; ``meta`` is in the schema's metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    value = pa.float16() if dtype == "float16" else pa.float32()
    strings = [(name, pa.string()) for name in Row._fields]
    schema = pa.schema([*strings, ("embedding", pa.list_(value, shape[1]))], metadata={_META: json.dumps(meta)})
    with (
        written_whole(output) as file,
        parquet.ParquetWriter(file, schema, use_dictionary=["source", "modality"]) as writer,
    ):
        for vectors, rows in _grouped(parts):
            columns = [pa.array(_utf8(column), pa.string()) for column in zip(*rows, strict=True)]
            flat = pa.array(vectors.ravel(), value)
            writer.write_table(
                pa.Table.from_arrays([*columns, pa.FixedSizeListArray.from_arrays(flat, shape[1])], schema=schema)
            )


def _grouped(parts: Iterator[Rows]) -> Iterator[Rows]:
    """Parts joined into row groups of a size that readers like."""
    vectors: list[NDArray[Any]] = []
    rows: list[Row] = []
    for own_vectors, own_rows in parts:
        vectors.append(own_vectors)
        rows += own_rows
        if len(rows) >= _ROW_GROUP:
            yield np.concatenate(vectors), rows
            vectors, rows = [], []
    if rows:
        yield np.concatenate(vectors), rows


def _utf8(column: Sequence[str | None]) -> list[str | None]:
    """Names of files may hold bytes that are no UTF-8, which Parquet refuses."""
    return [None if text is None else text.encode("utf-8", "replace").decode() for text in column]


def _write_npy(
    output: Path, parts: Iterator[Rows], shape: tuple[int, int], dtype: str, meta: Mapping[str, Any]
) -> None:
    """The array; beside it the key of each row, one a line, and ``meta``. The array comes last: where it is, all is."""
    beside = output.with_suffix(".meta.json"), output.with_suffix(".keys.txt")
    with written_whole(output) as file, written_whole(beside[0]) as about, written_whole(beside[1]) as keys:
        np.lib.format.write_array_header_2_0(
            file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        )
        for vectors, rows in parts:
            file.write(vectors.tobytes())
            lines = (" ".join(row.key.splitlines()) for row in rows)
            keys.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        about.write(json.dumps(meta, indent=2).encode())
        for written in (file, about, keys):
            written.flush()
            os.fsync(written.fileno())
        output.unlink(missing_ok=True)  # what stood there stands until the new one has found room
