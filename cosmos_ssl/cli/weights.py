"""What commands that read weights share: ``--checkpoint``, ``--which``, ``--device``, and overrides of its config."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any


def add_source(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--checkpoint`` and ``--trust-code``, and let overrides stand anywhere on the command line."""
    theirs = "a model of OpenCLIP, Hugging Face or timm"
    kinds = f"a run folder, one of its checkpoints, an official file, a released name, or {theirs}"
    parser.add_argument("--checkpoint", required=required, metavar="C", help=kinds)
    add_trust_code(parser)
    parser.set_defaults(overrides=[])


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add these flags, and those of one role on a device."""
    add_source(parser)
    parser.add_argument(
        "--which",
        default="student",
        metavar="ROLE",
        help="whose weights: student, teacher, or a callback's name (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, ... (default: %(default)s)"
    )
    parser.epilog = (
        "key.sub=value arguments override the checkpoint's config, such as model.text.heads=4, and may stand anywhere."
    )


def add_batches(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how samples are gone through."""
    parser.add_argument("--batch-size", type=positive, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="threads that decode (default: one a core, at most 8)"
    )


def options_of(arguments: argparse.Namespace, function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that a function of ``cosmos_ssl`` takes by their names."""
    return {name: value for name, value in vars(arguments).items() if name in signature(function).parameters}


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above zero")
    return int(text)


def add_trust_code(parser: argparse.ArgumentParser) -> None:
    """The flag of all commands that build a model from a run's own config."""
    words = (
        "also import the code that the run's config names as python:MODULE.CLASS; without it parts of "
        "installed packages alone are used"
    )
    parser.add_argument("--trust-code", action="store_true", help=words)


@contextmanager
def reading(*, shown: bool = True) -> Iterator[None]:
    """Show on stderr what is logged of weights that are read: what was taken, what was passed over, what is assumed."""
    from rich.console import Console

    from cosmos_ssl.engine.watch import lines

    with lines(Console(stderr=True, quiet=not shown)):
        yield
