"""The tiny run and helpers around it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny.py."""
    torch.set_num_threads(1)  # forked children would hang in OpenMP's pool
    spec = importlib.util.spec_from_file_location("tiny", TINY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    """Rows of a run's metrics.jsonl without what the clock has a part in."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        timed = ("samples_per_second", "data_wait")
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]

    return read


@pytest.fixture
def start_tiny() -> Callable[..., subprocess.Popen[str]]:
    """Start tiny.py as a process of its own."""
    started = []

    def start(run_dir: Path, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, str(TINY), str(run_dir), json.dumps(options)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
