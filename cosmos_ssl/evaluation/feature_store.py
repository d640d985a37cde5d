"""A resumable store of features: what was computed of a job lies in a folder, piece by piece, until the job is done.

A piece counts where its file is whole, its name (a digest of the job and of its samples) is the one looked for, and
the files of its samples are what they were; else it is computed again. So a job that was ended, in whatever way and on
however many ranks, goes on where it was, and nothing of another one is ever mixed in.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_ssl.errors import UserError
from cosmos_ssl.files import check_seal, seal, written_whole

KEPT_DAYS = 7
"""So long a job that was ended waits to be gone on with."""
_JOB = "job.json"
_OURS = re.compile(r"job\.json|[0-9a-f]{32}\.pt|tmp\w+\.part|\.nfs\w+|\d{6}\.npz")  # the last: pieces of version 0.1.0
_log = logging.getLogger("cosmos_ssl.evaluation")


class Piece(NamedTuple):
    """What was computed of some samples."""

    rows: Tensor | None
    """[n, ...] on the host; None where not one sample can be used."""
    notes: list[Any]
    """Strings, numbers and lists of these, of the samples that can be used."""
    bad: list[tuple[int, str, str]]
    """Place, key and reason of each that cannot."""
    stamps: list[list[str]]
    """Size and time of the files of each sample, where these are looked at."""


class FeatureStore:
    """The pieces of one job as files of a folder; None keeps nothing.

    Where the folder cannot be written, nothing is kept and that is told once; with ``needed`` OSError is raised.
    """

    def __init__(self, folder: Path | None, *, needed: bool = False) -> None:
        self.folder = folder
        self._needed = needed
        self._writable = folder is not None

    def get(self, name: str) -> Piece | None:
        """The piece of this name, if it is there and whole."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.pt"
        try:
            check_seal(path)
            return Piece(*torch.load(path, map_location="cpu", weights_only=True))
        except (
            Exception
        ):  # torch.load raises many kinds for a foreign file; each means that the piece is computed again
            return None

    def put(self, name: str, piece: Piece) -> None:
        """Keep a piece."""
        if self.folder is None or not self._writable:
            return
        content = io.BytesIO()
        torch.save(tuple(piece), content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / f"{name}.pt") as file:
                file.write(content.getbuffer())
                seal(file)
        except OSError as error:
            if self._needed:
                raise
            reason = error.strerror or error
            _log.warning("%s cannot be written (%s): an interrupted evaluation will start again", self.folder, reason)
            self._writable = False

    def clear(self) -> None:
        """Remove the folder: the job is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def clear_old(self) -> None:
        """Remove the folders beside this one that nothing was put into for a week: jobs that were ended for good."""
        for folder in self.folder.parent.glob("*") if self.folder is not None else ():
            with suppress(OSError):  # another process may be removing it
                if folder != self.folder and time.time() - folder.stat().st_mtime > KEPT_DAYS * 86_400:
                    shutil.rmtree(folder, ignore_errors=True)

    def claim(self, job: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder this job's, by a file ``job.json`` in it, or find it so.

        Raises UserError where it is another job's (unless ``overwrite``), and as ``beginning`` does.
        """
        assert self.folder is not None
        there = self.beginning()
        if there and there != job:
            if not overwrite:
                check_same(there, job, f"{self.folder} holds the beginning of another job")
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        for left in self.folder.glob("*.part"):  # of a process that was killed while it wrote
            left.unlink()
        if not (path := self.folder / _JOB).exists():
            with written_whole(path) as file:
                file.write(json.dumps(job, indent=2).encode())

    def beginning(self) -> dict[str, Any] | None:
        """The job that the folder is the beginning of, empty where nothing is told yet; None where there is no folder.

        Raises UserError for what is no such folder: nothing of somebody else's is ever removed.
        """
        folder, found = self.folder, None
        assert folder is not None
        if not folder.is_symlink() and not folder.exists():
            return None
        if not folder.is_symlink() and folder.is_dir() and all(_OURS.fullmatch(path.name) for path in folder.iterdir()):
            if not (path := folder / _JOB).exists():
                return {}  # killed as it began
            with suppress(OSError, ValueError):
                found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or "part_size" not in found:
            told = f"{folder} is no beginning of embeddings, or its {_JOB} is damaged"
            raise UserError(f"{told}. Move it away, or give another output")
        return found


def check_same(there: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise UserError, which begins with ``what``, where the job that is there is not the one that is wanted."""
    names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
    if names:
        changes = ", ".join(f"{name}: {_short(there.get(name))} -> {_short(wanted.get(name))}" for name in names)
        raise UserError(f"{what} ({changes}). Give another output, or --overwrite")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:8]}..."
