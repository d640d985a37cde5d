"""``cosmos-ssl embed``: embeddings of pictures, shards or texts, as Parquet or NumPy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cosmos_ssl import __version__
from cosmos_ssl.cli.checkpoint import add_checkpoint, load_checkpoint
from cosmos_ssl.cli.progress import progress
from cosmos_ssl.errors import EXIT_DONE, UserError
from cosmos_ssl.files import storage_faults


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "embed",
        help="embeddings of pictures, shards or texts, as Parquet or NumPy",
        description="Unit vectors of a folder of pictures, picture files, webdataset shards, or a text file with one text a line. "
        "The same command again continues what was interrupted.",
    )
    add_checkpoint(parser)
    data = "a folder of pictures, picture files, a .txt file, or shards (braces, *, ::)"
    parser.add_argument("--data", nargs="+", required=True, metavar="DATA", help=data)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="E.parquet; or E.npy, with E.keys.txt and E.meta.json")
    parser.add_argument("--what", choices=("image", "text", "both"), help="(default: text for a text file, else image)")
    texts = "captions of shards: txt, or a field of the JSON (default: %(default)s)"
    parser.add_argument("--texts", default="txt", metavar="FIELD", help=texts)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads that decode (default: one a core, at most 8)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that holds other embeddings")
    parser.set_defaults(run=_embed)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above zero")
    return int(text)


def _embed(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.evaluation.embedding import Job, embed
    from cosmos_ssl.evaluation.embedding_io import open_samples
    from cosmos_ssl.evaluation.samples import threads_of_this_process

    with storage_faults("embed: storage fails"):
        samples, usual = open_samples(arguments.data)
        if usual == "text" and arguments.what not in (None, "text"):
            raise UserError(f"--what {arguments.what}: {arguments.data[0]} holds texts alone")
        encoder, checkpoint = load_checkpoint(arguments)
        job = Job(
            samples=samples,
            what=arguments.what or usual,
            texts=arguments.texts,
            dtype=arguments.dtype,
            batch_size=arguments.batch_size,
            workers=arguments.workers or threads_of_this_process(),
            overrides=arguments.overrides,
            about={"checkpoint": checkpoint, "which": arguments.which, "cosmos_ssl": __version__},
        )
        with progress("samples embedded") as told:
            report = embed(encoder, job, arguments.output, overwrite=arguments.overwrite, progress=told)
    if report.kept:
        print(f"{report.kept:,} of {len(samples):,} samples had been embedded before", file=sys.stderr)
    for reason, (count, key) in report.bad.items():
        print(f"{count:,} of {len(samples):,} samples left out: {reason}, such as {key}", file=sys.stderr)
    print(f"{report.rows:,} embeddings of {encoder.spec.embed_dim} numbers in {arguments.output}")
    return EXIT_DONE
