"""``cosmos-ssl embed``: embeddings of pictures, shards or texts, as Parquet or NumPy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.checkpoint import add_batches, add_checkpoint, options_of, reading
from cosmos_ssl.cli.progress import progress
from cosmos_ssl.errors import EXIT_DONE


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "embed",
        help="embeddings of pictures, shards or texts, as Parquet or NumPy",
        description="Unit vectors of a folder of pictures, picture files, webdataset shards, or a text file with "
        "one text a line. The same command again continues what was interrupted.",
    )
    add_checkpoint(parser)
    data = "a folder of pictures, picture files, a .txt file, or shards (braces, *, ::)"
    parser.add_argument("--data", nargs="+", required=True, metavar="DATA", help=data)
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="E.parquet; or E.npy, with E.keys.txt and E.meta.json",
    )
    parser.add_argument("--what", choices=("image", "text", "both"), help="(default: text for a text file, else image)")
    texts = "captions of shards: txt, or a field of the JSON (default: %(default)s)"
    parser.add_argument("--texts", default="txt", metavar="FIELD", help=texts)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="(default: %(default)s)")
    add_batches(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that holds other embeddings")
    parser.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.build.uses import embed

    with reading(), progress("samples embedded") as told:
        report = embed(arguments.checkpoint, **options_of(arguments, embed), progress=told)
    if report.kept:
        print(f"{report.kept:,} of {report.samples:,} samples had been embedded before", file=sys.stderr)
    for reason, (count, key) in report.bad.items():
        print(f"{count:,} of {report.samples:,} samples left out: {reason}, such as {key}", file=sys.stderr)
    print(f"{report.rows:,} embeddings of {report.width} numbers in {arguments.output}")
    return EXIT_DONE
