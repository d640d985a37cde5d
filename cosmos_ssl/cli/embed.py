"""``cosmos-ssl embed``: embeddings of pictures, shards or texts, as Parquet or NumPy."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.place import add_place, carry_out
from cosmos_ssl.cli.progress import stages
from cosmos_ssl.cli.weights import add_batches, add_checkpoint, options_of, reading
from cosmos_ssl.errors import EXIT_DONE

if TYPE_CHECKING:
    from cosmos_ssl.evaluation.embedding import Report


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "embed",
        help="embeddings of pictures, shards or texts, as Parquet or NumPy",
        description="Unit vectors of a folder of pictures, picture files, webdataset shards, or a text file with "
        "one text a line. The same command again continues what was interrupted. With several ranks (--profile, "
        "torchrun, srun) each embeds what it is ready for next, and one file is written as by one process.",
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
    add_place(parser)
    parser.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> int:
    folder = arguments.output.with_name(f"{arguments.output.name}.slurm")
    work, check = partial(_on_this_rank, arguments), partial(_check, arguments)
    return carry_out("embed", arguments, work, folder=folder, check=check)


def _check(arguments: argparse.Namespace) -> None:
    from cosmos_ssl.build.uses import check_embedding

    check_embedding(arguments.checkpoint, **options_of(arguments, check_embedding))


def _on_this_rank(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.build.uses import embed, rank_device
    from cosmos_ssl.engine.distributed import SHARING, World, as_run_errors, joined_world

    with joined_world(rank_device(arguments.device), wait=SHARING), as_run_errors():
        first = World().first
        with reading(shown=first), stages(shown=first) as told:
            report = embed(
                arguments.checkpoint,
                **options_of(arguments, embed),
                progress=lambda done, total: told("samples embedded", done, total),
            )
        if first:
            _tell(arguments, report)
    return EXIT_DONE


def _tell(arguments: argparse.Namespace, report: Report) -> None:
    if report.kept:
        print(f"{report.kept:,} of {report.samples:,} samples had been embedded before", file=sys.stderr)
    for reason, (count, key) in report.bad.items():
        print(f"{count:,} of {report.samples:,} samples left out: {reason}, such as {key}", file=sys.stderr)
    print(f"{report.rows:,} embeddings of {report.width} numbers in {arguments.output}")
