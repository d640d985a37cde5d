"""``cosmos-ssl export``: a trained model in the form of another library."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.checkpoint import add_trust_code
from cosmos_ssl.errors import EXIT_DONE

if TYPE_CHECKING:
    from cosmos_ssl.api import Role
    from cosmos_ssl.interop.export import Origin

# The names of cosmos_ssl.interop.export.FORMATS, which would import torch (a test compares them).
_FORMATS = ("openclip", "huggingface", "timm", "official")


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a trained model for OpenCLIP, Hugging Face, timm or the official program",
        epilog="key.sub=value arguments say what a checkpoint does not tell, such as model.text.heads=4.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="C", help="a run folder, one of its checkpoints, an official file, or an OpenCLIP model"
    )
    parser.add_argument("--format", required=True, choices=_FORMATS, help="openclip, huggingface: both towers; timm: the image tower")
    parser.add_argument("--which", choices=("student", "teacher"), help="whose weights (default: student; official: both where there are)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    add_trust_code(parser)
    parser.set_defaults(run=_export, overrides=[])


def _export(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.build import load
    from cosmos_ssl.build_weights import roles_of
    from cosmos_ssl.engine.checkpoint import latest_checkpoint
    from cosmos_ssl.interop.export import export
    from cosmos_ssl.interop.hub import checkpoint_path

    path = checkpoint_path(arguments.checkpoint)
    newest = latest_checkpoint(path) if path.is_dir() and not (path / "manifest.json").exists() else None
    source = str(newest or path)
    roles: tuple[Role, ...] = (arguments.which,) if arguments.which else ("student",)
    if arguments.format == "official" and arguments.which is None:
        roles = roles_of(source)
    models = {role: load(source, role, overrides=arguments.overrides, trust_code=arguments.trust_code) for role in roles}
    notes = export(models, arguments.format, arguments.output, _origin(arguments.checkpoint, Path(source)))
    print(f"{arguments.output}: the {' and the '.join(roles)} of {arguments.checkpoint} for {arguments.format}")
    for note in notes:
        print(note)
    return EXIT_DONE


def _origin(checkpoint: str, read: Path) -> Origin:
    """The name of a model and, where what was read is its run's last checkpoint, the results of the run."""
    from cosmos_ssl.config import load_config
    from cosmos_ssl.engine.checkpoint import checkpoint_step
    from cosmos_ssl.engine.run_folder import RunFolder
    from cosmos_ssl.interop.export import Origin

    step, run = checkpoint_step(read), read.parent.parent
    if step is None or not (run / "config.yaml").is_file():
        return Origin(name=Path(checkpoint).stem or "model", checkpoint=checkpoint)
    result = RunFolder(run).result()
    metrics = result["metrics"] if result is not None and result["step"] == step else {}
    return Origin(name=load_config(run / "config.yaml").config.name, checkpoint=checkpoint, metrics=metrics)
