"""A copy of the code in the run folder, so that a run that waits or starts again executes what it was submitted
with.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cosmos_ssl import registry
from cosmos_ssl.config import part_paths
from cosmos_ssl.config.source import packaged_configs
from cosmos_ssl.errors import UserError

CODE = "code"
"""The copy's folder in a run folder; it comes first on PYTHONPATH."""

_OWN = ("cosmos_ssl", "cosmos_ssl_launch", "cosmos_ssl_plugins")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def sources(tree: Mapping[str, Any]) -> dict[str, Path]:
    """Find what a run of this config imports from places that may change: name -> package folder or module file.

    The project itself, and of the parts that the config names the top-level packages that are not in site-packages:
    those of editable installs and of PYTHONPATH. Libraries stay as installed; their versions are recorded.
    """
    parts = [registry.find(group, keys["type"]) for _, group, keys in part_paths(tree)]
    others = {part.object_path.partition(":")[0].partition(".")[0] for part in parts} - set(_OWN)
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    found = {name: _place(name) for name in (*_OWN, *sorted(others))}
    return {
        name: path
        for name, path in found.items()
        if path is not None and (name in _OWN or not any(path.resolve().is_relative_to(folder) for folder in installed))
    }


def _place(name: str) -> Path | None:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return None  # a namespace package: several folders, none of them its own
    path = Path(spec.origin)
    return path.parent if path.name == "__init__.py" else path


def take_snapshot(run: Path, tree: Mapping[str, Any]) -> Path:
    """Copy ``sources`` to ``run/code``, in place of an older copy. Raises UserError where that cannot be written."""
    new, folder = run / f".{CODE}.tmp", run / CODE
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name, path in sources(tree).items():
            if path.is_dir():
                shutil.copytree(path, new / name, ignore=_LEFT_OUT)
            else:
                shutil.copy2(path, new)
        for name, path in packaged_configs().items():  # in a clone they lie beside the package, in a wheel within
            target = new / "cosmos_ssl" / "configs" / f"{name}.yaml"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except OSError as error:
        raise UserError(
            f"the code cannot be copied to {folder}: {error}. Give another output_dir, or --no-snapshot"
        ) from error
    return folder


def drop_snapshot(run: Path) -> None:
    """Remove an older copy (``--no-snapshot``)."""
    shutil.rmtree(run / CODE, ignore_errors=True)
