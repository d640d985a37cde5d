"""``cosmos-ssl data merge`` and ``data split``: sets of shards joined in a list, and one set divided by its
pictures.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.common import add_json, write_json
from cosmos_ssl.cli.data.common import URLS, add_command, add_continue, add_workers, options_of, storage
from cosmos_ssl.cli.progress import stages
from cosmos_ssl.errors import EXIT_DONE


def add_parser(commands: Any) -> None:
    """Add the two commands."""
    merge = commands.add_parser("merge", help="join sets of shards in one list file, and index it")
    merge.add_argument("urls", nargs="+", metavar="SET", help=f"one set of {URLS}")
    merge.add_argument("--repeat", type=int, nargs="+", metavar="N", help="how often each set counts (default: once)")
    where = "the list file, good wherever shards are named"
    merge.add_argument("--output", type=Path, required=True, metavar="FILE.list", help=where)
    add_json(merge)
    merge.set_defaults(run=_merge)

    split = add_command(commands, "split", "hold samples out for validation, by a hash of their pictures")
    split.add_argument("--output", type=Path, required=True, metavar="DIR", help="where train-*.tar and val-*.tar go")
    split.add_argument("--share", type=float, default=0.01, help="share that is held out (default: %(default)s)")
    decides = "content: samples of equal pictures stay on one side; key: a sample's key decides (default: %(default)s)"
    split.add_argument("--by", choices=("content", "key"), default="content", help=decides)
    size = "of val-*.tar (default: %(default)s)"
    split.add_argument("--samples-per-shard", type=int, default=5000, metavar="N", help=size)
    add_workers(split)
    add_continue(split, "interrupted work")
    add_json(split)
    split.set_defaults(run=_split)


def _merge(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.shards.merge import merge_shards

    sets, repeats = [[url] for url in arguments.urls], arguments.repeat or [1] * len(arguments.urls)
    with storage():
        merged = merge_shards(sets, repeats, arguments.output)
    distinct = f" ({merged.distinct_shards:,} and {merged.distinct_samples:,} without repetition)"
    repeated = merged.shards > merged.distinct_shards
    print(f"{merged.shards:,} shards, {merged.samples:,} samples{distinct * repeated}")
    train, schema = f'"data.train_data={arguments.output}"', merged.common_schema
    if schema is not None:
        for url, fields in zip(arguments.urls, merged.fields, strict=True):
            print(f"captions of {url}: {', '.join(fields) or 'none found'}")
        print(
            "these sets hold their captions in other fields: a schema that reads some of them leaves samples of "
            "the others without any"
        )
        train += f' "data.caption_schema={schema}"'
    print(f"train on them: {train}")
    if arguments.json:
        write_json(arguments.json, {**asdict(merged), "caption_schema": schema})
    return EXIT_DONE


def _split(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.shards.split import SplitOptions, split_shards

    options = options_of(SplitOptions, arguments)
    with storage(), stages() as progress:
        counts = split_shards(options, progress, resume=arguments.resume)
    for side, name in (("train", "train"), ("val", "validation")):
        pattern = f"{arguments.output}/{side}-*.tar"
        samples, shards = counts[f"{name}_samples"], counts[f"{name}_shards"]
        print(f"{side + ':':6} {pattern}  ({samples:,} samples, {shards:,} shards)")
    if arguments.json:
        write_json(arguments.json, counts)
    return EXIT_DONE
