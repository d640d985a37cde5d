"""``cosmos-ssl plugins new``: a plugin project that works, to begin from."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from string import Template

from cosmos_ssl import __version__, registry
from cosmos_ssl.errors import UserError
from cosmos_ssl.files import storage_faults


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of plugin: its group, what the templates' part does, and how a config uses it (``$part``)."""

    group: str
    summary: str
    usage: str


KINDS = {
    "augmenter": Kind(
        "augmenters",
        "random crops of pictures, mirrored by chance.",
        "augmenters:\n  image: {type: $part, size: 64}",
    ),
    "head": Kind(
        "heads",
        "a small network on the image tower's features.",
        'heads:\n  $part: {type: $part, output_dim: 128}\n# and a loss with Need(head="$part"), as in the test',
    ),
    "loss": Kind(
        "losses",
        "views of a picture close together, pictures spread over the sphere.",
        "losses:\n  $part: {type: $part, loss_weight: 0.1}",
    ),
    "optimizer": Kind(
        "optimizers",
        "the sign of a running mean of gradients.",
        "optimizer: {type: $part, lr: 1e-4, momentum: 0.95}",
    ),
    "schedule": Kind(
        "schedules",
        "the inverse square root of the step, which needs no end.",
        "schedule: {type: $part, warmup_steps: 30}",
    ),
    "teacher": Kind(
        "teachers",
        "a moving average that starts quick and grows slow.",
        "teacher: {type: $part, momentum: 0.99}",
    ),
    "tower": Kind(
        "towers",
        "patches of which none knows of another.",
        "model:\n  image: {type: $part, width: 128, image_size: 64, patch_size: 16}",
    ),
    "tokenizer": Kind("tokenizers", "characters as tokens.", "tokenizer: {type: $part, context_length: 48}"),
    "dataset": Kind("datasets", "pictures of two colours each, with their names.", "data: {type: $part, samples: 256}"),
    "evaluator": Kind(
        "evaluators",
        "how even the features of random pictures are.",
        "evaluators:\n  $part: {type: $part, every_epochs: 1}",
    ),
    "writer": Kind(
        "writers", "a table of a run's numbers for people.", "logging:\n  writers:\n    $part: {type: $part}"
    ),
    "callback": Kind(
        "callbacks", "noise on the weights that fades.", "callbacks:\n  $part: {type: $part, scale: 1e-4}"
    ),
}

_OTHER_MEANINGS = ("true", "false", "null", "python", "tests", "conftest")
"""Names that YAML, the registry or pytest would take for something else."""


def new_plugin(name: str, kind: str, output: Path) -> Path:
    """Write the project ``name`` into a new folder inside ``output``; that folder.

    The distribution is called ``name``, module and part as it is with underscores, the class in CapWords. Raises
    UserError for a name that cannot be used or is in use, and where the folder exists or cannot be written.
    """
    words = _words(name, KINDS[kind])
    folder = output / name
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{words['module']}.py": f"{kind}.py",
        f"tests/test_{words['module']}.py": f"test_{kind}.py",
    }
    templates = resources.files("cosmos_ssl.cli") / "templates"
    texts = {
        path: Template((templates / f"{template}.template").read_text("utf-8")).substitute(words)
        for path, template in files.items()
    }
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists already. Give another name, or another folder with --output")
    with storage_faults(f"{folder} cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        try:
            for path, text in texts.items():
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_text(text, encoding="utf-8")
        except OSError:
            shutil.rmtree(folder)  # made above: nobody else's
            raise
    return folder


def _words(name: str, kind: Kind) -> dict[str, str]:
    """The words that fill the templates' places. Raises UserError for a name that cannot be used."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*", name):
        raise UserError(
            f"'{name}' is no name for a plugin: use letters, digits and single hyphens, beginning with a letter"
        )
    module = name.replace("-", "_").lower()
    group = registry.GROUPS[kind.group]
    cls = "".join(word.capitalize() for word in module.split("_"))
    _check_free(name, module, cls, kind)
    words = {"distribution": name, "module": module, "part": module, "cls": cls, "group": kind.group}
    words |= {"noun": group.noun, "title": group.noun.capitalize(), "summary": kind.summary, "bound": _bound()}
    return words | {"usage": Template(kind.usage).substitute(words)}


def _check_free(name: str, module: str, cls: str, kind: Kind) -> None:
    """Raise UserError where the name means something already."""
    offered = [record for record in registry.records() if (record.group, record.name) == (kind.group, module)]
    installed = [
        found.version
        for found in metadata.distributions()
        if registry.canonical(found.name or "") == registry.canonical(name)
    ]
    if keyword.iskeyword(module) or module in _OTHER_MEANINGS:
        reason = f"'{module}' has a meaning of its own"
    elif module in sys.stdlib_module_names:
        reason = f"Python has a module '{module}'"
    elif offered:
        reason = f"{offered[0].source} offers {kind.group}/{module}"
    elif installed:
        reason = f"{name} {installed[0]} is installed"
    elif importlib.util.find_spec(module) is not None:
        reason = f"there is a module '{module}' already"
    elif cls in _names_in_templates():
        reason = f"its class would be called '{cls}', as another one that it needs"
    else:
        return
    raise UserError(f"the name '{name}' is taken: {reason}. Give another one")


def _names_in_templates() -> set[str]:
    """The names that the code of the templates imports or defines."""
    templates = resources.files("cosmos_ssl.cli") / "templates"
    text = "\n".join(file.read_text("utf-8") for file in templates.iterdir() if file.name.endswith(".py.template"))
    return {
        name
        for line in re.findall(r"^(?:from .* import|class) (.*)", text, re.MULTILINE)
        for name in re.findall(r"\w+", line)
    }


def _bound() -> str:
    """The versions that the plugin is written for: from this one on, up to the next minor one."""
    major, minor, *_ = __version__.split(".")
    return f">={major}.{minor},<{major}.{int(minor) + 1}"
