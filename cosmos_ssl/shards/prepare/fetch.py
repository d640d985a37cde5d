"""Images from their URLs through img2dataset, which needs an older webdataset: a command from an environment of its
own.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_ssl.data.cache import cache_root, lock
from cosmos_ssl.data.table.files import URL_NAMES, OnRead, open_table
from cosmos_ssl.errors import StorageError, UserError
from cosmos_ssl.files import written_whole
from cosmos_ssl.liveness import OnStage
from cosmos_ssl.shards.prepare.tables import find_tables, stamps

_REQUIREMENT = "img2dataset>=1.45"
_SHARD = 10_000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """Where images go, and how they are fetched."""

    folder: Path
    command: str | None = None
    """An img2dataset to run instead of the one that is installed for this."""
    image_size: int = 384
    """Pixels of the shorter side; larger images are made as small as that, smaller ones are kept."""
    retries: int = 2
    timeout: int = 10
    """Seconds."""
    processes: int = 1
    threads: int = 32
    """By process."""


@dataclass(slots=True)
class Fetched:
    """What img2dataset says of its shards."""

    shards: list[str] = field(default_factory=list)
    urls: int = 0
    images: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """URLs that gave no image, by reason."""


def fetch(tables: Sequence[str], url_column: str | None, options: FetchOptions, progress: OnStage) -> Fetched:
    """Download the images of the tables' URLs into shards; those that are whole already are kept.

    Raises UserError where a table has no URLs or the command cannot be run, StorageError where it fails.
    """
    count = _write_urls(tables, url_column, options, lambda done: progress("URLs listed", done, 0))
    shards = -(-count // _SHARD)
    if _finished(options.folder) < shards:
        command = shlex.split(options.command) if options.command else [str(environment())]
        told = lambda: progress("shards fetched", _finished(options.folder), shards)  # noqa: E731
        _run(_command(command, options), options.folder, told)
    found = read_stats(options.folder / "shards")
    if not found.shards:
        raise StorageError(
            f"--fetch {options.folder}: img2dataset wrote no shard; see {options.folder / 'img2dataset.log'}"
        )
    return found


def _write_urls(tables: Sequence[str], url_column: str | None, options: FetchOptions, told: OnRead) -> int:
    """List the URLs in ``urls.parquet``, once for the same tables; how many there are."""
    import pyarrow as pa
    from pyarrow import parquet

    paths = find_tables(tables)
    identity = {"tables": stamps(paths), "url_column": url_column, "image_size": options.image_size}
    note, urls = options.folder / "fetch.json", options.folder / "urls.parquet"
    if note.is_file():
        try:
            found = json.loads(note.read_bytes())
        except ValueError as error:
            raise UserError(
                f"--fetch {options.folder}: fetch.json is damaged ({error}). Give another folder"
            ) from error
        if found["identity"] != identity:
            raise UserError(
                f"--fetch {options.folder}: this folder holds the images of other tables or options. Give "
                "another folder"
            )
        return int(found["urls"])
    if options.folder.is_dir() and any(path.suffix != ".part" for path in options.folder.iterdir()):
        raise UserError(f"--fetch {options.folder}: this folder holds something else. Give a new one")
    options.folder.mkdir(parents=True, exist_ok=True)
    count, schema = 0, pa.schema([("url", pa.string())])
    with written_whole(urls) as file, parquet.ParquetWriter(file, schema) as writer:
        for path in paths:
            table = open_table(path)
            column = table.choose(url_column, (*URL_NAMES, "image_path"))
            if column is None:
                raise UserError(
                    f"{path}: which column holds URLs? Name it by --url-column. The table has: "
                    f"{', '.join(table.columns)}"
                )
            for batch in table.batches([column]):
                found = [u.strip() for u in batch.column(0).to_pylist() if isinstance(u, str) and "://" in u]
                writer.write_table(pa.table({"url": found}, schema=schema))
                count += len(found)
                told(count)
    if count == 0:
        urls.unlink()
        raise UserError(f"--fetch: no URLs in the column '{column}' of {paths[0]}")
    with written_whole(note) as file:
        file.write(json.dumps({"identity": identity, "urls": count}).encode())
    return count


def _command(command: Sequence[str], options: FetchOptions) -> list[str]:
    values: dict[str, Any] = {
        "url_list": options.folder / "urls.parquet",
        "input_format": "parquet",
        "url_col": "url",
        "output_format": "webdataset",
        "output_folder": options.folder / "shards",
        "number_sample_per_shard": _SHARD,
        "image_size": options.image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "retries": options.retries,
        "timeout": options.timeout,
        "processes_count": options.processes,
        "thread_count": options.threads,
        "incremental_mode": "incremental",
    }
    return [*command, *(f"--{name}={value}" for name, value in values.items())]


def _run(command: Sequence[str], folder: Path, told: Callable[[], None]) -> None:
    log = folder / "img2dataset.log"
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            raise UserError(f"--fetch: {command[0]} cannot be run: {error.strerror}") from error
    try:
        while True:
            try:
                code = process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                told()
    finally:
        if process.poll() is None:  # Ctrl-C reached us alone: it is a session of its own
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    told()
    if code:
        last = next(
            (line for line in reversed(log.read_text("utf-8", "replace").splitlines()) if line.strip()),
            "it said nothing",
        )
        raise StorageError(
            f"--fetch: img2dataset failed (exit code {code}): {last.strip()[:200]}. See {log}; the same command goes on"
        )


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _finished(folder: Path) -> int:
    return len(list((folder / "shards").glob("*_stats.json")))


def read_stats(folder: Path) -> Fetched:
    """The shards of a folder that img2dataset finished, which it marks by ``NNNNN_stats.json``. Raises OSError."""
    found = Fetched()
    for path in sorted(folder.glob("*_stats.json")):
        try:
            stats = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):  # written in place: it was killed in the midst
            continue
        shard = path.with_name(path.name.replace("_stats.json", ".tar"))
        if not shard.is_file():
            continue
        found.shards.append(str(shard))
        found.urls += int(stats["count"])
        found.images += int(stats["successes"])
        found.failures.update({reason: int(count) for reason, count in stats.get("status_dict", {}).items()})
    del found.failures["success"]
    return found


def environment() -> Path:
    """The img2dataset command of a virtual environment in the cache folder, installed when first asked for.

    Raises UserError.
    """
    folder = cache_root() / "img2dataset"
    command, whole = folder / "bin" / "img2dataset", folder / "installed"
    with lock(folder.with_suffix(".lock")):
        if not whole.is_file():
            for step in (
                [sys.executable, "-m", "venv", "--clear", str(folder)],
                [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", _REQUIREMENT],
            ):
                done = subprocess.run(step, capture_output=True, text=True, check=False)
                if done.returncode:
                    said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
                    raise UserError(
                        f"--fetch: img2dataset cannot be installed in {folder}: {said}. Or name your own by "
                        "--fetch-command"
                    )
            whole.touch()
    return command
