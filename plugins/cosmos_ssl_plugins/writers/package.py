"""Libraries that a writer needs and cosmos-ssl does not bring."""

from __future__ import annotations

from importlib.util import find_spec


def check_package(module: str, package: str = "") -> None:
    """Raise ValueError, with what to do, where a module cannot be imported; it is not imported here."""
    if find_spec(module) is None:
        raise ValueError(f"needs {module}, which is not installed. Run: pip install {package or module}")
