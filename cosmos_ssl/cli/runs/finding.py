"""Which folders are meant, and by what names they are told apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cosmos_ssl.errors import UserError, listed
from cosmos_ssl.files import is_run_folder

_ADVICE = "Give folders that cosmos-launch has written, such as runs/quickstart, or the folder that holds them"


def find_runs(given: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The run folders that are meant, each once, and what was given beside and is none (``runs/*`` matches anything).

    A folder of runs stands for those in it. Raises UserError for what is not there, and where there is no run at all.
    """
    found: dict[Path, Path] = {}
    others: list[str] = []
    for path in given:
        if not path.exists():
            raise UserError(f"{path} is not there. {_ADVICE}")
        inner = (
            [path] if is_run_folder(path) else sorted(filter(is_run_folder, path.iterdir())) if path.is_dir() else []
        )
        if not inner:
            others.append(str(path))
        for run in inner:
            found.setdefault(run.resolve(), run)
    if not found:
        raise UserError(f"{listed(others)}: no run folder, for there is no config.yaml. {_ADVICE}")
    return list(found.values()), others


def short_names(runs: Sequence[Path]) -> list[str]:
    """Names of folders without what all paths begin by."""
    if len(runs) == 1:
        return [runs[0].resolve().name]
    parents = [str(run.resolve().parent) for run in runs]
    common = os.path.commonpath(parents)
    return [os.path.relpath(run.resolve(), common) for run in runs]
