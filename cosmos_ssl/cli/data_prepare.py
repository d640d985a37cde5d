"""``cosmos-ssl data prepare``: caption tables and images become training shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.cli.data_common import add_workers, storage
from cosmos_ssl.cli.progress import stages
from cosmos_ssl.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from cosmos_ssl.shards.prepare import Counts, FetchOptions, PrepareOptions

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
    add = parser.add_argument
    add(
        "--table",
        nargs="+",
        required=True,
        metavar="FILE",
        help="CSV or parquet files, also with braces or *; or a folder of parquet files",
    )
    add(
        "--images",
        nargs="+",
        metavar="IMAGES",
        help="a folder of images, named by paths below it; or shards (or a folder of them) with a 'url' in each "
        "JSON, named by URLs",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="where the shards go")
    add("--image-column", metavar="NAME", help="the column of image paths (default: found by its name)")
    add("--url-column", metavar="NAME", help="the column of URLs (default: found by its name)")
    add(
        "--caption-columns",
        metavar="A,B",
        help="the columns of captions" + (" (default: the published ones)" * (schema != "captions")),
    )
    add(
        "--sentences",
        metavar="RULE",
        help="published: cut at newlines, </s> and every full stop; careful: not at"
        " those of numbers, abbreviations and initials (default: "
        f"{'careful' if schema == 'captions' else 'published'})",
    )
    add("--samples-per-shard", type=int, default=5000, metavar="N", help="(default: %(default)s)")
    add(
        "--name",
        dest="prefix",
        default="train",
        metavar="NAME",
        help="shards are NAME-0000.tar and so on (default: %(default)s)",
    )
    add("--no-decode", action="store_true", help="do not check that pictures can be decoded")
    add(
        "--max-pixels",
        type=int,
        default=1 << 26,
        metavar="N",
        help="larger pictures are left out (default: %(default)s)",
    )
    add_workers(parser)
    add("--dry-run", action="store_true", help="count what matches, write nothing")
    add(
        "--list-missing",
        type=Path,
        metavar="FILE",
        help="list rows without images, images without rows and what was left out",
    )
    add("--continue", dest="resume", action="store_true", help="go on with interrupted work")
    _add_fetching(parser.add_argument_group("fetching images from their URLs, through img2dataset").add_argument)
    add_json(parser)
    parser.set_defaults(run=_run, schema=schema)


def _add_fetching(add: Callable[..., Any]) -> None:
    add(
        "--fetch",
        type=Path,
        metavar="DIR",
        help="download the images into shards there, in place of --images; the command again goes on",
    )
    add(
        "--fetch-command",
        metavar="CMD",
        help="an img2dataset of your own (default: one is installed in the user's cache folder)",
    )
    add(
        "--fetch-size",
        type=int,
        default=384,
        metavar="N",
        help="pixels of the shorter side, larger images are shrunk (default: %(default)s)",
    )
    add("--fetch-retries", type=int, default=2, metavar="N", help="(default: %(default)s)")
    add("--fetch-timeout", type=int, default=10, metavar="SECONDS", help="(default: %(default)s)")
    add("--fetch-threads", type=int, default=32, metavar="N", help="by process (default: %(default)s)")


def _run(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.shards.prepare import Prepare, PrepareOptions, fetch
    from cosmos_ssl.shards.prepare.output import cores

    if (arguments.images is None) == (arguments.fetch is None):
        raise UserError("give --images DIR or SHARDS, or --fetch DIR to download them; one of the two")
    options = PrepareOptions(
        schema=arguments.schema,
        tables=arguments.table,
        images=arguments.images or (),
        output=arguments.output,
        caption_columns=[name.strip() for name in (arguments.caption_columns or "").split(",") if name.strip()],
        url_column=arguments.url_column,
        image_column=arguments.image_column,
        samples_per_shard=arguments.samples_per_shard,
        name=arguments.prefix,
        rule=arguments.sentences,
        decode=not arguments.no_decode,
        max_pixels=arguments.max_pixels,
        workers=cores() if arguments.workers is None else arguments.workers,
    )
    with storage(), stages() as progress:
        if arguments.fetch is not None:
            fetched = fetch(options.tables, options.url_column, _fetch_options(arguments, options), progress)
            options = replace(options, images=fetched.shards)
            failures = "".join(f"; {reason} {count:,}" for reason, count in fetched.failures.most_common(8))
            print(f"fetched: {fetched.images:,} images of {fetched.urls:,} URLs{failures}")
        prepare = Prepare(options, progress)
        counts = (
            prepare.dry_run(arguments.list_missing)
            if arguments.dry_run
            else prepare.run(resume=arguments.resume, missing=arguments.list_missing)
        )
    print(_report(counts, options, dry_run=arguments.dry_run), end="")
    if arguments.list_missing:
        print(f"what did not match: {arguments.list_missing}")
    if arguments.json:
        write_json(arguments.json, asdict(counts))
    return EXIT_DONE


def _fetch_options(arguments: argparse.Namespace, options: PrepareOptions) -> FetchOptions:
    from cosmos_ssl.shards.prepare import FetchOptions

    return FetchOptions(
        folder=arguments.fetch.absolute(),
        command=arguments.fetch_command,
        image_size=arguments.fetch_size,
        retries=arguments.fetch_retries,
        timeout=arguments.fetch_timeout,
        threads=arguments.fetch_threads,
        processes=options.workers,
    )


def _report(counts: Counts, options: PrepareOptions, *, dry_run: bool) -> str:
    left = [
        (f"{counts.rows_without_image:,}", "rows without an image"),
        (f"{counts.rows_repeated:,}", "rows whose image an earlier row names"),
        (f"{counts.images_without_row:,}", "images without a row"),
        (f"{counts.images_repeated:,}", "images whose URL an earlier one has"),
        (f"{counts.images_without_url:,}", "images without a URL in their JSON"),
        *((f"{count:,}", f"left out: {reason} ({counts.examples[reason]})") for reason, count in counts.bad.items()),
        *(
            (f"{count:,}", f"samples whose {name} is a list already, taken as it is")
            for name, count in counts.listed.items()
        ),
    ]
    lines = [row for row in left if row[0] != "0"]
    width = max((len(count) for count, _ in lines), default=0)
    told = table([(f"{count:>{width}}", what) for count, what in lines], "  ") if lines else ""
    found = f"{counts.rows:,} rows, {counts.images:,} images: {counts.matched:,} match\n{told}"
    if dry_run:
        return f"{found}{counts.shards:,} shards would be written to {options.output}\n"
    digits = max(4, len(str(counts.shards - 1)))
    pattern = f"{options.output}/{options.name}-{{{0:0{digits}d}..{counts.shards - 1:0{digits}d}}}.tar"
    train = f'"data.train_data={pattern}" "data.caption_schema={options.caption_schema}"'
    return (
        f"{found}{counts.samples:,} samples in {counts.shards:,} shards, {counts.bytes:,} bytes\ntrain on "
        f"them: {train}\n"
    )
