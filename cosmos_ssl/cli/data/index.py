"""``cosmos-ssl data index``: shards, a folder of pictures or tables scanned once, so that runs start at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.common import add_json, write_json
from cosmos_ssl.cli.data.common import add_command, storage
from cosmos_ssl.cli.progress import progress
from cosmos_ssl.errors import EXIT_DONE


def add_parser(commands: Any) -> None:
    """Add the command."""
    index = add_command(
        commands, "index", "scan shards, a folder or tables once, so that runs start at once", folder=True, table=True
    )
    where = "where the manifest goes (default: beside the data, or the user's cache folder)"
    index.add_argument("--cache-dir", metavar="DIR", help=where)
    every_byte = "hash every byte, not some of each file: no change goes unseen from then on"
    index.add_argument("--hash", action="store_true", help=every_byte)
    add_json(index)
    index.set_defaults(run=_index)


def _index(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.data.folder import picture_folder
    from cosmos_ssl.data.table import is_table

    folder = picture_folder(arguments.urls)
    if folder is not None:
        report = _index_folder(folder, arguments)
    else:
        report = _index_table(arguments) if is_table(arguments.urls) else _index_shards(arguments)
    if arguments.json:
        write_json(arguments.json, report)
    return EXIT_DONE


def _index_shards(arguments: argparse.Namespace) -> dict[str, Any]:
    from cosmos_ssl.data import Shards
    from cosmos_ssl.data.manifest import load_manifest, notices

    with storage(), progress("shards indexed") as told:
        manifest = load_manifest(arguments.urls, cache_dir=arguments.cache_dir, full_hash=arguments.hash, progress=told)
    size = sum(shard.size for shard in manifest.shards)
    print(f"{len(manifest.shards):,} shards, {len(manifest):,} samples, {size:,} bytes")
    _tell("manifest", manifest.path, Shards(arguments.urls, manifest=manifest).identity(), notices(manifest))
    shards = [{"name": s.name, "samples": s.samples, "bytes": s.size} for s in manifest.shards]
    return {"shards": len(shards), "samples": len(manifest), "bytes": size, "by_shard": shards}


def _index_folder(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from cosmos_ssl.data.folder import Folder, folder_notices, load_folder

    with storage(), progress("parts indexed") as told:
        index = load_folder(folder, cache_dir=arguments.cache_dir, full_hash=arguments.hash, progress=told)
    print(f"{len(index):,} pictures, {len(index.classes):,} class folders, {len(index.folders()):,} folders in all")
    _tell("index", index.path, Folder(folder, cache_dir=arguments.cache_dir).identity(), folder_notices(index))
    sizes = zip(index.classes, index.class_sizes().tolist(), strict=True)
    return {"samples": len(index), "by_class": [{"name": name, "samples": size} for name, size in sizes]}


def _index_table(arguments: argparse.Namespace) -> dict[str, Any]:
    from cosmos_ssl.data.table import TableData, table_notices

    data = TableData(arguments.urls, cache_dir=arguments.cache_dir)
    with storage(), progress("parts indexed") as told:
        index = data.load(full_hash=arguments.hash, progress=told)
    image, captions, label = index.chosen
    print(f"{len(index.pieces):,} tables, {len(index):,} rows")
    print(f"columns: pictures {image}, captions {', '.join(captions) or 'none'}, labels {label or 'none'}")
    _tell("index", index.path, data.identity(), table_notices(index))
    tables = [{"name": piece.name, "samples": piece.rows, "bytes": piece.size} for piece in index.pieces]
    return {"samples": len(index), "columns": index.chosen._asdict(), "by_table": tables}


def _tell(what: str, path: Path | None, identity: Any, notices: list[str]) -> None:
    print(f"{what}: {path or 'kept nowhere: no folder can be written'}")
    if "full_hash" in identity:
        print(f"hash: {identity['full_hash']}, of every byte")
    for line in notices:
        print(line)
