"""The rules of the house: who may import whom, sizes, docstrings, what the repository may speak of."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"cosmos_ssl": ROOT, "cosmos_ssl_plugins": ROOT / "plugins", "cosmos_ssl_launch": ROOT / "launch"}
FILES = sorted(path for package, root in SOURCES.items() for path in (root / package).rglob("*.py"))
# Each may import what stands before it.
ORDER = [
    "errors",
    "streams",
    "files",
    "pictures",
    "bounds",
    "marks",
    "liveness",
    "api",
    "registry",
    "config",
    "identity",
    "functional",
    "data",
]
ORDER += ["models", "evaluation", "interop", "engine", "build"]  # training ends here
ORDER += ["shards", "cost", "search", "testing", "cli"]
QUICK = ("errors", "streams", "files", "pictures", "bounds", "marks", "liveness", "registry", "config", "identity")
NO_TORCH = (*(f"cosmos_ssl.{unit}" for unit in QUICK), "cosmos_ssl_launch")
PUBLIC = ("api", "functional", "models", "data", "evaluation", "testing")
LAUNCH_MAY = ("errors", "streams", "files", "registry", "config", "build", "cli")
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "open_clip",
    "lightly",
    "xformers",
    "submitit",
    "tensorboard",
    "fvcore",
)


def module_name(path: Path) -> str:
    """``cosmos_ssl.data.order`` of a file of one of the packages."""
    for package, root in SOURCES.items():
        if path.is_relative_to(root / package):
            return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    raise ValueError(path)


MODULES = {module_name(path) for path in FILES}


def unit_of(module: str) -> str:
    """The name in ORDER that a module of cosmos_ssl belongs to."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, at any depth of its code."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            # "from cosmos_ssl import build" names a module; "from cosmos_ssl.api import Loss" names an object
            for alias in node.names:
                named = f"{source}.{alias.name}"
                yield node.lineno, named if source in SOURCES or named in MODULES else source


def forbidden(path: Path, target: str) -> str:
    """Why ``path`` may not import ``target``; empty where it may."""
    module = module_name(path)
    package, other = module.partition(".")[0], target.partition(".")[0]
    here, there = unit_of(module), unit_of(target)
    if other not in SOURCES or other == package != "cosmos_ssl":
        return ""
    if other != "cosmos_ssl":
        core = package == "cosmos_ssl"
        return (
            "the core finds parts through entry points alone" if core else "parts and launch do not know of each other"
        )
    if module == "cosmos_ssl" or there in ("", "__version__", "API_VERSION"):
        return ""
    if package != "cosmos_ssl":
        allowed = PUBLIC if package == "cosmos_ssl_plugins" else LAUNCH_MAY
        return "" if there in allowed else f"only {', '.join(allowed)} may be imported here"
    if homeless := {here, there} - set(ORDER):
        return f"'{homeless.pop()}' has no place in ORDER"
    return "" if ORDER.index(there) <= ORDER.index(here) else f"'{here}' comes before '{there}'"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_import_directions(path: Path) -> None:
    faults = [
        f"{path}:{line} imports {target}: {why}" for line, target in imports(path) if (why := forbidden(path, target))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("cosmos_ssl/data/x.py", "cosmos_ssl.engine.step", False),
        ("cosmos_ssl/engine/x.py", "cosmos_ssl.data.order", True),
        ("cosmos_ssl/build/x.py", "cosmos_ssl_plugins.losses.clip", False),
        ("cosmos_ssl/data/x.py", "cosmos_ssl.shards.check", False),
        ("cosmos_ssl/build/x.py", "cosmos_ssl.cost.flops", False),
        ("plugins/cosmos_ssl_plugins/losses/x.py", "cosmos_ssl.registry", False),
        ("plugins/cosmos_ssl_plugins/losses/x.py", "cosmos_ssl.api", True),
        ("launch/cosmos_ssl_launch/x.py", "cosmos_ssl.engine.trainer", False),
        ("cosmos_ssl/config/source.py", "cosmos_ssl.registry", True),
    ],
)
def test_the_directions_are_told_apart(importer: str, target: str, allowed: bool) -> None:
    assert (not forbidden(ROOT / importer, target)) == allowed


def test_no_module_imports_itself_by_way_of_others() -> None:
    """At module level, a package's files by way of its ``__init__`` too."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[module_name(path)] = {target for _, target in imports(path, tree) if target in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", [p for p in FILES if module_name(p).startswith(NO_TORCH)], ids=module_name)
def test_no_heavy_library_where_answers_must_be_quick(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if module_name(path).startswith("cosmos_ssl_launch"):  # a function there may import what it needs
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    faults = [
        f"{path}:{line} imports {target}" for line, target in imports(path, tree) if target.split(".")[0] in HEAVY
    ]
    assert not faults, "\n".join(faults)


def test_commands_start_without_torch() -> None:
    code = (
        "import sys, cosmos_ssl, cosmos_ssl.cli, cosmos_ssl_launch, cosmos_ssl.registry, cosmos_ssl.config; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_docstrings_and_sizes(path: Path) -> None:
    tree = ast.parse(path.read_text())
    faults = [] if ast.get_docstring(tree) else [f"{path}:1 does not say what it is"]
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ):
            faults.append(f"{path}:{node.lineno} {node.name} has no docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            inner = node.body[1:] if ast.get_docstring(node) else node.body
            if inner and (length := (node.end_lineno or 0) - inner[0].lineno + 1) > 60:
                faults.append(f"{path}:{node.lineno} {node.name} has {length} lines, at most 60")
    assert not faults, "\n".join(faults)


def test_the_engine_knows_no_method() -> None:
    methods = re.compile(
        r"(?<![a-z])(cosmos_attention|cross_modality|dino|ibot|siglip|silc|slip|flair|coca|moco|dreamlip|superclass)",
        re.IGNORECASE,
    )
    faults = [
        f"{path}:{number} {line.strip()}"
        for path in sorted((ROOT / "cosmos_ssl" / "engine").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if methods.search(line)
    ]
    assert not faults, "\n".join(faults)


def tracked() -> list[Path]:
    """The files of the repository that git holds and that still exist."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_repository_speaks_of_the_project_alone() -> None:
    places = "|".join(("work", "home", "root", "tmp", "Users", "mnt"))
    hosts = "|".join(
        rf"{host}\.{end}"
        for host, end in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("anaconda", "org"),
            ("npmjs", "com"),
            ("pytorch", "org/whl"),
        )
    )
    foreign = re.compile(rf"(?<![\w.~}}$)\]])/({places})/\w|{hosts}".encode())
    faults = [
        f"{path.relative_to(ROOT)}:{number} {line.decode(errors='replace').strip()[:120]}"
        for path in tracked()
        if b"\0" not in (content := path.read_bytes())
        for number, line in enumerate(content.splitlines(), 1)
        if foreign.search(line)
    ]
    assert not faults, "\n".join(faults)


def test_tests_and_tools_are_no_packages() -> None:
    assert not [path for folder in ("tests", "tools") for path in (ROOT / folder).rglob("__init__.py")]
