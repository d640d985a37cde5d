"""The process with a CUDA device that is not there, and the module whose functions run in it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cosmos_ssl.cost.fake_device import fake_device

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def on_device() -> Iterator[ModuleType]:
    """The module on_device.py, where the other process finds it too."""
    sys.path.insert(0, str(Path(__file__).parent))
    yield importlib.import_module("on_device")
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def run(on_device: ModuleType) -> Iterator[Run]:
    """``run(function, *arguments)`` calls a function of on_device.py in a process with the device."""
    with fake_device() as run:
        yield run
