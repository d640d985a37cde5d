"""``cosmos-ssl export``: a trained model in the form of another library."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.weights import add_source, options_of, reading
from cosmos_ssl.errors import EXIT_DONE, UserError
from cosmos_ssl.interop.forms import FORMS


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a trained model for another library, as ONNX, or onto the Hugging Face hub",
        epilog="key.sub=value arguments say what a checkpoint does not tell, such as model.text.heads=4.",
    )
    add_source(parser)
    parser.add_argument(
        "--format",
        dest="form",
        required=True,
        choices=tuple(FORMS),
        help="openclip, huggingface: both towers; timm: the image tower; onnx, torch: towers as programs",
    )
    parser.add_argument(
        "--which",
        metavar="ROLE",
        help="whose weights: student, teacher, a callback's name (default: student; official: both where there are)",
    )
    licence = (
        "the hub's identifier of the terms that the weights are under, for the card, such as cc-by-nc-4.0 "
        "(default: %(default)s)"
    )
    parser.add_argument("--license", dest="licence", type=_licence, default="other", metavar="ID", help=licence)
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--push",
        type=_repository,
        metavar="ORG/NAME",
        help="upload it to the Hugging Face hub; --output may be left out",
    )
    parser.add_argument("--private", action="store_true", help="with --push: a repository that others do not see")
    parser.set_defaults(run=_export)


def _licence(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no identifier of a licence on the hub, such as mit or cc-by-nc-4.0"
        )
    return text


def _repository(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no place on the hub, such as my-lab/my-model")
    return text


def _export(arguments: argparse.Namespace) -> int:
    if arguments.output is None and arguments.push is None:
        raise UserError("export: give --output DIR, --push ORG/NAME, or both")
    if arguments.private and arguments.push is None:
        raise UserError("--private: needs --push ORG/NAME")
    from cosmos_ssl.build.uses import export

    with reading():
        done = export(arguments.checkpoint, **options_of(arguments, export))
    place = arguments.output or arguments.push
    print(f"{place}: the {' and the '.join(done.roles)} of {arguments.checkpoint} for {arguments.form}")
    for note in done.notes:
        print(note)
    return EXIT_DONE
