"""Settings of the recipes against those of their sources: what differs is what a recipe's header declares.

``tests/data/recipe_sources.yaml`` holds the settings of the sources. An entry has the key's ``value`` and ``where`` the
source says so. ``here`` tells what is different where no key of the config holds it.
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_core import to_jsonable_python

from cosmos_ssl import registry
from cosmos_ssl.config import load_config
from cosmos_ssl.config.loading import part_paths

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
"""Recipe's file -> key -> entry of the table."""
for source in yaml.safe_load((ROOT / "tests/data/recipe_sources.yaml").read_text()).values():
    for config in source.get("configs") or [source["config"]]:
        SETTINGS[config].update(source["settings"])


@pytest.fixture
def package(install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the components of a package in ``plugins`` known, without installing it."""

    def package(config: str) -> None:
        folder = ROOT.joinpath(*Path(config).parts[:2])
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        groups = project["entry-points"].items()
        entries = {f"{key.removeprefix('cosmos_ssl.')}/{n}": path for key, group in groups for n, path in group.items()}
        monkeypatch.syspath_prepend(str(folder))
        install(project["name"], project["version"], entries=entries)

    return package


def resolved(path: Path) -> Any:
    """The config's tree, with the defaults of all components."""
    tree = load_config(path).tree
    for _, group, keys in part_paths(tree):
        record = registry.find(group, keys["type"])
        cls = registry.load(record)
        given = {key: value for key, value in keys.items() if key not in registry.GROUPS[group].reserved}
        values, faults = registry.check_options(record, cls, given)
        assert not faults
        keys |= {option.name: option.default for option in registry.options_of(cls)} | values  # type: ignore[operator]
    return to_jsonable_python(tree, fallback=str)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return all(key in a and same(a[key], value) for key, value in b.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return bool(a == pytest.approx(b, rel=1e-3) if numbers else a == b)


def value_of(tree: Any, key: str) -> Any:
    for step in key.split("."):
        assert isinstance(tree, dict) and step in tree, f"the config has no key {key}"
        tree = tree[step]
    return tree


def declared(path: Path) -> tuple[set[str], set[str]]:
    """The keys that a recipe's header names under "Differences" and under "Not verified"."""
    head = re.match(r"(?:#.*\n)+", path.read_text())
    assert head is not None
    labels = re.findall(r"^# ([A-Z][\w ]+):(?: |$)", head[0], re.M)
    assert labels[:5] == ["Paper", "Source", "Published", "Differences", "Not verified"]
    differences, unverified = re.split("^# Not verified:", head[0].partition("# Differences:")[2], flags=re.M)
    listed = re.match(r"[^\n]*(?:\n#   [^\n]*)*", unverified)
    assert listed is not None
    items = re.findall(r"^# - ([^:]+(?:\n#   [^:]+)*):", differences, re.M)
    keys = [set(re.findall(r"[\w.-]+", text.replace("\n#", ""))) for text in (", ".join(items), listed[0])]
    return keys[0] - {"none"}, keys[1] - {"none"}


@pytest.mark.parametrize("config", SETTINGS)
def test_a_header_declares_what_differs_from_the_source(config: str, package: Callable[[str], None]) -> None:
    path = ROOT / ("" if config.startswith("plugins/") else "configs") / config
    if config.startswith("plugins/"):
        package(config)
    ours, entries = resolved(path), SETTINGS[config]
    known = {key: entry for key, entry in entries.items() if "here" not in entry}
    differing = {key for key, x in known.items() if "value" in x and not same(value_of(ours, key), x["value"])}
    unverified = {key for key in known if entries[key]["where"] == "not verified"}
    assert declared(path) == (differing | (entries.keys() - known.keys()), unverified)


def test_every_recipe_has_its_source() -> None:
    configs = ROOT / "configs"
    recipes = {path.relative_to(configs).as_posix() for path in (configs / "methods").glob("*.yaml")}
    assert recipes <= SETTINGS.keys()
