"""What all commands that read weights share: ``--checkpoint``, ``--which``, ``--device``, and overrides of its config."""

from __future__ import annotations

import argparse
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
    add_trust_code(parser)
    parser.epilog = "key.sub=value arguments override the checkpoint's config, such as model.text.heads=4, and may stand anywhere."
    parser.set_defaults(overrides=[])


def add_trust_code(parser: argparse.ArgumentParser) -> None:
    """The flag of all commands that build a model from a run's own config."""
    words = "also import the code that the run's config names as python:MODULE.CLASS; without it parts of installed packages alone are used"
    parser.add_argument("--trust-code", action="store_true", help=words)


def load_checkpoint(arguments: argparse.Namespace) -> tuple[ModelEncoder, str]:
    """The model, and the name of what was read: of a run folder its newest checkpoint. Raises UserError."""
    from cosmos_ssl.build import load
    from cosmos_ssl.engine.checkpoint import latest_checkpoint
    from cosmos_ssl.interop.hub import checkpoint_path

    device = choose_device(arguments.device)
    path = checkpoint_path(arguments.checkpoint)
    newest = latest_checkpoint(path) if path.is_dir() and not (path / "manifest.json").exists() else None
    name = str(newest or path)
    encoder = load(name, arguments.which, device=device, overrides=arguments.overrides, trust_code=arguments.trust_code)
    return encoder, name


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
