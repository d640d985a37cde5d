"""``cosmos-ssl data scenes``: the procedural default data set, written as shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.data.common import options_of
from cosmos_ssl.errors import EXIT_DONE

_NUMBERS = {
    "train_samples": 4096,
    "validation_samples": 512,
    "image_size": 64,
    "colours": 8,
    "seed": 0,
    "shard_samples": 1024,
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    scenes = commands.add_parser("scenes", help="write the procedural default data set")
    where = "where the shards go (default: the user's cache folder)"
    scenes.add_argument("--output", type=Path, metavar="DIR", help=where)
    for name, default in _NUMBERS.items():
        option = f"--{name.replace('_', '-')}"
        scenes.add_argument(option, type=int, default=default, metavar="N", help="(default: %(default)s)")
    scenes.set_defaults(run=_scenes)


def _scenes(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.data.scenes import SceneOptions, default_folder, write_scenes

    options = options_of(SceneOptions, arguments)
    folder = write_scenes((arguments.output or default_folder(options)).absolute(), options)
    print(f"train: {options.pattern(folder, 'train')}  ({options.train_samples:,} samples)")
    print(f"val:   {options.pattern(folder, 'val')}  ({options.validation_samples:,} samples)")
    return EXIT_DONE
