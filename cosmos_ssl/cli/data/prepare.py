"""``cosmos-ssl data prepare``: caption tables and images become training shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.cli.data.common import add_continue, add_max_pixels, add_workers, options_of, storage
from cosmos_ssl.cli.progress import stages
from cosmos_ssl.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from cosmos_ssl.shards.prepare import Counts, PrepareOptions

_SCHEMAS = {
    "dreamlip": "the recaptioned tables of CC3M, CC12M and YFCC15M: seven caption columns",
    "pixelprose": "PixelProse: original_caption and vlm_caption",
    "captions": "any table: name its columns",
}


def add_parser(commands: Any) -> None:
    """Add the command and its sub-commands."""
    parser = commands.add_parser("prepare", help="join caption tables with images into shards")
    schemas = parser.add_subparsers(metavar="TABLES", required=True)
    for name, purpose in _SCHEMAS.items():
        _add_schema(schemas.add_parser(name, help=purpose, description=purpose), name)


def _add_schema(parser: argparse.ArgumentParser, schema: str) -> None:
    add, own = parser.add_argument, schema == "captions"
    tables = "CSV or parquet files, also with braces or *; or a folder of parquet files"
    add("--table", dest="tables", nargs="+", required=True, metavar="FILE", help=tables)
    images = "a folder of images, named by paths below it; or shards (or a folder of them) with a 'url' in each "
    add("--images", nargs="+", default=(), metavar="IMAGES", help=f"{images}JSON, named by URLs")
    add("--output", type=Path, required=True, metavar="DIR", help="where the shards go")
    add("--image-column", metavar="NAME", help="the column of image paths (default: found by its name)")
    add("--url-column", metavar="NAME", help="the column of URLs (default: found by its name)")
    published = " (default: the published ones)" * (not own)
    add("--caption-columns", type=_names, default=(), metavar="A,B", help=f"the columns of captions{published}")
    rules = "published: cut at newlines, </s> and every full stop; careful: not at those of numbers, abbreviations"
    rules += f" and initials (default: {'careful' if own else 'published'})"
    add("--sentences", dest="rule", metavar="RULE", help=rules)
    add("--samples-per-shard", type=int, default=5000, metavar="N", help="(default: %(default)s)")
    name = "shards are NAME-0000.tar and so on (default: %(default)s)"
    add("--name", dest="prefix", default="train", metavar="NAME", help=name)
    add("--no-decode", dest="decode", action="store_false", help="do not check that pictures can be decoded")
    add_max_pixels(parser, "left out")
    add_workers(parser)
    add("--dry-run", action="store_true", help="count what matches, write nothing")
    missing = "list rows without images, images without rows and what was left out"
    add("--list-missing", type=Path, metavar="FILE", help=missing)
    add_continue(parser, "interrupted work")
    _add_fetching(parser.add_argument_group("fetching images from their URLs, through img2dataset").add_argument)
    add_json(parser)
    parser.set_defaults(run=_run, schema=schema)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _add_fetching(add: Callable[..., Any]) -> None:
    folder = "download the images into shards there, in place of --images; the command again goes on"
    add("--fetch", type=Path, metavar="DIR", help=folder)
    command = "an img2dataset of your own (default: one is installed in the user's cache folder)"
    add("--fetch-command", metavar="CMD", help=command)
    size = "pixels of the shorter side, larger images are shrunk (default: %(default)s)"
    add("--fetch-size", type=int, default=384, metavar="N", help=size)
    add("--fetch-retries", type=int, default=2, metavar="N", help="(default: %(default)s)")
    add("--fetch-timeout", type=int, default=10, metavar="SECONDS", help="(default: %(default)s)")
    add("--fetch-threads", type=int, default=32, metavar="N", help="by process (default: %(default)s)")


def _run(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.shards.prepare import FetchOptions, Preparation, PrepareOptions, fetch

    if (not arguments.images) == (arguments.fetch is None):
        raise UserError("give --images DIR or SHARDS, or --fetch DIR to download them; one of the two")
    options = options_of(PrepareOptions, arguments, name=arguments.prefix)
    with storage(), stages() as progress:
        if arguments.fetch is not None:
            fetching = FetchOptions(
                folder=arguments.fetch.absolute(),
                command=arguments.fetch_command,
                image_size=arguments.fetch_size,
                retries=arguments.fetch_retries,
                timeout=arguments.fetch_timeout,
                threads=arguments.fetch_threads,
                processes=options.workers,
            )
            fetched = fetch(options.tables, options.url_column, fetching, progress)
            options = replace(options, images=fetched.shards)
            failures = "".join(f"; {reason} {count:,}" for reason, count in fetched.failures.most_common(8))
            print(f"fetched: {fetched.images:,} images of {fetched.urls:,} URLs{failures}")
        preparation, missing = Preparation(options, progress), arguments.list_missing
        if arguments.dry_run:
            counts = preparation.dry_run(missing)
        else:
            counts = preparation.run(resume=arguments.resume, missing=missing)
    print(_report(counts, options, dry_run=arguments.dry_run), end="")
    if arguments.list_missing:
        print(f"what did not match: {arguments.list_missing}")
    if arguments.json:
        write_json(arguments.json, asdict(counts))
    return EXIT_DONE


def _report(counts: Counts, options: PrepareOptions, *, dry_run: bool) -> str:
    from cosmos_ssl.shards.output import numbers

    left = [
        (f"{counts.rows_without_image:,}", "rows without an image"),
        (f"{counts.rows_repeated:,}", "rows whose image an earlier row names"),
        (f"{counts.images_without_row:,}", "images without a row"),
        (f"{counts.images_repeated:,}", "images whose URL an earlier one has"),
        (f"{counts.images_without_url:,}", "images without a URL in their JSON"),
        *((f"{count:,}", f"left out: {reason} ({counts.examples[reason]})") for reason, count in counts.bad.items()),
    ]
    for name, count in counts.listed.items():
        left.append((f"{count:,}", f"samples whose {name} is a list already, taken as it is"))
    lines = [row for row in left if row[0] != "0"]
    width = max((len(count) for count, _ in lines), default=0)
    told = table([(f"{count:>{width}}", what) for count, what in lines], "  ") if lines else ""
    found = f"{counts.rows:,} rows, {counts.images:,} images: {counts.matched:,} match\n{told}"
    if dry_run:
        return f"{found}{counts.shards:,} shards would be written to {options.output}\n"
    shards = numbers(counts.shards)
    pattern = f"{options.output}/{options.name}-{{{shards[0]}..{shards[-1]}}}.tar"
    train = f'"data.train_data={pattern}" "data.caption_schema={options.caption_schema}"'
    wrote = f"{counts.samples:,} samples in {counts.shards:,} shards, {counts.bytes:,} bytes"
    return f"{found}{wrote}\ntrain on them: {train}\n"
