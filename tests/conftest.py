"""Fixtures that tests of several folders share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from cosmos_ssl import registry

Install = Callable[..., Path]


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
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {text}\n" for text in requires)]
        (info / "METADATA").write_text("".join(lines))
        sections = [f"[cosmos_ssl.{group}]\n{part} = {path}\n" for key, path in entries.items() for group, part in [key.split("/")]]
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
