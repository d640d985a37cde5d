"""Fixtures that tests of several folders share."""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
from PIL import Image

from cosmos_ssl import registry
from cosmos_ssl.data import storage

Install = Callable[..., Path]

multiprocessing.set_forkserver_preload(["pytest", "torch", "cosmos_ssl.testing"])  # what ranks would take seconds for


@pytest.fixture(scope="session")
def in_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[Any, Any]]:
    """Run ``function(rank, world, path of a store, *arguments, results)`` as so many processes; ``results``."""

    def run(function: Callable[..., None], world: int, *arguments: Any) -> dict[Any, Any]:
        with torch.multiprocessing.Manager() as manager:
            results = manager.dict()
            given = (world, str(tmp_path_factory.mktemp("ranks") / "store"), *arguments, results)
            torch.multiprocessing.start_processes(function, given, world, start_method="forkserver")
            return dict(results)

    return run


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution that does not exist: its metadata and modules, in a temporary folder on the path.

    ``install(name, version, entries={"losses/triplet": "module:Class"}, modules={"module": source}, requires=[...])``
    returns that folder.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(
        name: str,
        version: str = "1.0",
        *,
        entries: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
    ) -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            *(f"Requires-Dist: {text}\n" for text in requires),
        ]
        (info / "METADATA").write_text("".join(lines))
        sections = [
            f"[cosmos_ssl.{group}]\n{part} = {path}\n"
            for key, path in entries.items()
            for group, part in [key.split("/")]
        ]
        (info / "entry_points.txt").write_text("\n".join(sections))
        for module, source in (modules or {}).items():
            (site / f"{module}.py").write_text(source)
        importlib.invalidate_caches()
        registry.forget()
        return site

    yield install
    registry.forget()
    for module, loaded in list(sys.modules.items()):
        if str(getattr(loaded, "__file__", None) or "").startswith(str(site)):
            del sys.modules[module]


# shards made on the spot


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test alone, and no waits between attempts to read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.001, 0.001))


def jpeg(number: int, side: int = 24) -> bytes:
    """A picture whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 77)).save(buffer, "png")
    return buffer.getvalue()


def members_of(number: int) -> dict[str, bytes]:
    """A sample as the tests' shards hold it, by extension."""
    table = {
        "raw_caption": [f"raw {number}"],
        "longIB_captions": [f"long {number} a", f"long {number} b"],
        "number": number,
    }
    return {
        "png": jpeg(number),
        "json": json.dumps(table).encode(),
        "txt": f"text {number}".encode(),
        "cls": str(number % 5).encode(),
    }


def write_tar(
    path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], format: int = tarfile.USTAR_FORMAT
) -> Path:
    """A shard of (key, {extension: bytes})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for key, parts in samples:
            for extension, body in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return path


@pytest.fixture
def tar() -> Callable[..., Path]:
    """``write_tar``."""
    return write_tar


@pytest.fixture
def parts() -> Callable[[int], dict[str, bytes]]:
    """``members_of``."""
    return members_of


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """Make shards of these sizes; their pattern. Samples are numbered through."""

    def make(
        *sizes: int, folder: str = "shards", change: Callable[[int, dict[str, bytes]], Any] = lambda i, m: None
    ) -> str:
        number = 0
        for shard, size in enumerate(sizes):
            samples = []
            for _ in range(size):
                found = members_of(number)
                change(number, found)
                samples.append((f"key{number:05d}", found))
                number += 1
            write_tar(tmp_path / folder / f"a-{shard:03d}.tar", samples)
        return str(tmp_path / folder / f"a-{{000..{len(sizes) - 1:03d}}}.tar")

    return make
