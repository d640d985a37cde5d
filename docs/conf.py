"""How Sphinx makes the pages: ``sphinx-build -W docs docs/_build``; docstrings by autodoc, Markdown by MyST."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cosmos_ssl

ROOT = Path(__file__).resolve().parents[1]

project = "cosmos_ssl"
author = "the contributors"
project_copyright = author
version = release = cosmos_ssl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "**.ipynb", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"cosmos_ssl {version}"
html_static_path: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a README that is taken in starts where its page stands

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
autodoc_preserve_defaults = True
_PAGES = {
    "launch/README.md": "/clusters.md",
    "cosmos_ssl/evaluation/README.md": "/evaluating.md",
    "cosmos_ssl/interop/README.md": "/forms.md",
    "configs/README.md": "/configs.md",
    "plugins/README.md": "/parts/built_in.md",
    "CONTRIBUTING.md": "/how.md",
}
"""Files of the repository that a page takes in: links to them lead to the page."""


def place_links(text: str, home: Path) -> str:
    """Return Markdown of a file in ``home`` with its relative links made for the pages: to the page that takes the
    file in, else the file's place in the repository as words.
    """

    def placed(match: re.Match[str]) -> str:
        words, target, anchor = match["words"], match["target"], match["anchor"] or ""
        path = (home / target).resolve()
        if not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if name in _PAGES:
            return f"[{words}]({_PAGES[name]}{anchor})"
        return f"{words} (`{name}`)" if words.strip("`") not in name else f"`{name}`"

    return re.sub(
        r"(?<!!)\[(?P<words>[^\]]*)\]\((?!https?:|#|/)(?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)", placed, text
    )


def _taken_in(app: Any, path: Path, parent: str, content: list[str]) -> None:
    """Place the links of a README that a page takes in."""
    whole = (Path(app.srcdir) / path).resolve()
    if whole.suffix == ".md" and not whole.is_relative_to(Path(app.srcdir)):
        content[0] = place_links(content[0], whole.parent)


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("include-read", _taken_in)
