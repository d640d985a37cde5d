"""``cosmos-ssl attend``: pictures of where words look in a picture, and the picture in words; zero-shot
segmentation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.weights import add_checkpoint, options_of, reading
from cosmos_ssl.errors import EXIT_DONE, UserError


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "attend",
        help="pictures of where words look in a picture, and the picture in words",
        description="Overlays, a grid and an HTML page of what the cross-attention heads look at, and of "
        "zero-shot segmentation.",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--image", dest="images", nargs="+", required=True, type=Path, metavar="I", help="picture files"
    )
    parser.add_argument(
        "--text",
        dest="texts",
        action="append",
        default=[],
        metavar="T",
        help="a text for each picture, or one for all; repeat the flag for several",
    )
    parser.add_argument("--all-pairs", action="store_true", help="every picture with every text")
    parser.add_argument(
        "--segment", metavar="A,B,...", help="class names: colour each place by the one that it is nearest to"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="where index.html, grid.png and the overlays go"
    )
    parser.set_defaults(run=_attend)


def _attend(arguments: argparse.Namespace) -> int:
    names = [name.strip() for name in (arguments.segment or "").split(",") if name.strip()]
    if arguments.segment is not None and len(names) < 2:
        raise UserError(f"--segment '{arguments.segment}': name at least two classes, such as 'cat,grass,sky'")
    from cosmos_ssl.build.uses import attend

    with reading():
        page = attend(arguments.checkpoint, **{**options_of(arguments, attend), "segment": names})
    print(page)
    return EXIT_DONE
