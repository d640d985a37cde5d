"""The tiny run and helpers around it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

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
        timed = ("samples_per_second", "data_wait", "slowest_rank", "slowest_rank_lag")
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
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def ranks(
    start_tiny: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[subprocess.Popen[str]]]:
    """Start tiny.py as the ranks of one world."""
    stores = []

    def start(run_dir: Path, world: int, **options: Any) -> list[subprocess.Popen[str]]:
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(stores[-1].port))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("WORLD_SIZE", str(world))
        started = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            started.append(start_tiny(run_dir, **options))
        return started

    return start


@pytest.fixture(scope="session")
def finished() -> Callable[..., tuple[list[int], list[str]]]:
    """Wait for processes: their exit codes, and what each said."""

    def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> tuple[list[int], list[str]]:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
        return [process.returncode for process in processes], said

    return finish


@pytest.fixture(scope="session")
def wait_for_step() -> Callable[[Path, int], None]:
    """Wait until a run has logged a step."""

    def wait(run_dir: Path, step: int) -> None:
        path, end = run_dir / "metrics.jsonl", time.monotonic() + 120
        while not (path.exists() and path.read_text().count("\n") >= step):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    return wait
