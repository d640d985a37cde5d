"""``cosmos-ssl data merge`` and ``data split``: sets of shards joined in a list, and one set divided by its
pictures.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.common import add_json, write_json
from cosmos_ssl.cli.data_common import URLS, add_workers, storage
from cosmos_ssl.cli.progress import stages
from cosmos_ssl.errors import EXIT_DONE


def add_parser(commands: Any) -> None:
    """Add the two commands."""
    merge = commands.add_parser("merge", help="join sets of shards in one list file, and index it")
    merge.add_argument("urls", nargs="+", metavar="SET", help=f"one set of {URLS}")
    merge.add_argument("--repeat", type=int, nargs="+", metavar="N", help="how often each set counts (default: once)")
    merge.add_argument(
        "--output", type=Path, required=True, metavar="FILE.list", help="the list file, good wherever shards are named"
    )
    add_json(merge)
    merge.set_defaults(run=_merge)

    split = commands.add_parser("split", help="hold samples out for validation, by a hash of their pictures")
    split.add_argument("urls", nargs="+", metavar="URLS", help=URLS)
    split.add_argument("--output", type=Path, required=True, metavar="DIR", help="where train-*.tar and val-*.tar go")
    split.add_argument("--share", type=float, default=0.01, help="share that is held out (default: %(default)s)")
    split.add_argument(
        "--by",
        choices=("content", "key"),
        default="content",
        help="content: samples of equal pictures stay on one side; key: a sample's key decides (default: %(default)s)",
    )
    split.add_argument(
        "--samples-per-shard", type=int, default=5000, metavar="N", help="of val-*.tar (default: %(default)s)"
    )
    add_workers(split)
    split.add_argument("--continue", dest="resume", action="store_true", help="go on with interrupted work")
    add_json(split)
    split.set_defaults(run=_split)


def _merge(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.shards.split import merge_shards

    with storage():
        merged = merge_shards(
            [[url] for url in arguments.urls], arguments.repeat or [1] * len(arguments.urls), arguments.output
        )
    distinct = f" ({merged.distinct_shards:,} and {merged.distinct_samples:,} without repetition)"
    print(
        f"{merged.shards:,} shards, {merged.samples:,} "
        f"samples{distinct if merged.shards > merged.distinct_shards else ''}"
    )
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
    from cosmos_ssl.shards.prepare.output import cores
    from cosmos_ssl.shards.split import SplitOptions, split_shards

    options = SplitOptions(
        urls=arguments.urls,
        output=arguments.output,
        share=arguments.share,
        by=arguments.by,
        samples_per_shard=arguments.samples_per_shard,
        workers=cores() if arguments.workers is None else arguments.workers,
    )
    with storage(), stages() as progress:
        counts = split_shards(options, progress, resume=arguments.resume)
    print(
        f"train: {arguments.output}/train-*.tar  ({counts['train_samples']:,} samples, "
        f"{counts['train_shards']:,} shards)"
    )
    print(
        f"val:   {arguments.output}/val-*.tar  ({counts['validation_samples']:,} samples, "
        f"{counts['validation_shards']:,} shards)"
    )
    if arguments.json:
        write_json(arguments.json, counts)
    return EXIT_DONE
