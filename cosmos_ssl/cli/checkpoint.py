"""What all commands that read weights share: ``--checkpoint``, ``--which``, ``--device``, and overrides of its config."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cosmos_ssl.errors import UserError

if TYPE_CHECKING:
    from cosmos_ssl.models.encoder import ModelEncoder


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``load_checkpoint`` reads, and overrides anywhere on the command line."""
    kinds = "a run folder, one of its checkpoints, an official file, a released name, or an OpenCLIP model"
    parser.add_argument("--checkpoint", required=True, metavar="C", help=kinds)
    parser.add_argument("--which", choices=("student", "teacher"), default="student", help="whose weights (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, ... (default: %(default)s)")
    parser.epilog = "key.sub=value arguments override the checkpoint's config, such as model.text.heads=4, and may stand anywhere."
    parser.set_defaults(overrides=[])


def load_checkpoint(arguments: argparse.Namespace) -> tuple[ModelEncoder, str]:
    """The model, and the name of what was read: of a run folder its newest checkpoint. Raises UserError."""
    from cosmos_ssl.build import load
    from cosmos_ssl.build_weights import find_source

    device = choose_device(arguments.device)
    with reading():
        source = find_source(arguments.checkpoint)
        return load(source, arguments.which, device=device, overrides=arguments.overrides), str(source)


@contextmanager
def reading(*, shown: bool = True) -> Iterator[None]:
    """Show on stderr what is logged of weights that are read: what was taken, what was passed over, what is assumed."""
    from rich.console import Console

    from cosmos_ssl.engine.watch import lines

    with lines(Console(stderr=True, quiet=not shown)):
        yield


def choose_device(name: str) -> str:
    """The device of this name, of ``auto`` the GPU, or the CPU where there is none. Raises UserError for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; no driver; a number that is not there
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
