"""The tiny run and helpers around it."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
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
        timed = ("samples_per_second", "data_wait", "gpu_wait", "memory", "mfu", "slowest_rank", "slowest_rank_lag")
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]

    return read


@pytest.fixture(scope="session")
def warm() -> Iterator[subprocess.Popen[str]]:
    """tests/warm.py, which forks for a program at once."""
    command = [sys.executable, str(TINY.parents[1] / "warm.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


class Fork:
    """A program in a fork of warm.py, with as much of a Popen as tests ask for; leads a session of its own."""

    def __init__(self, warm: subprocess.Popen[str], argv: list[str], output: Path) -> None:
        self.warm = warm
        self.output = output
        output.touch()
        self.pid = self._ask({"argv": argv, "env": dict(os.environ), "output": str(output)})
        self.end = os.pidfd_open(self.pid)
        self.returncode: int | None = None

    def _ask(self, what: Any) -> int:
        print(json.dumps(what), file=self.warm.stdin, flush=True)
        return int(self.warm.stdout.readline())

    def poll(self, timeout: float = 0) -> int | None:
        """The exit code, once the program has ended."""
        if self.returncode is None and select.select([self.end], [], [], timeout)[0]:
            self.returncode = self._ask(self.pid)
            os.close(self.end)
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, None]:
        """Wait for the end; what was said."""
        assert self.poll(timeout) is not None, f"still running after {timeout} s: {self.output.read_text()}"
        return self.output.read_text(), None

    def wait_for(self, words: str) -> None:
        """Wait until the program has said these words."""
        end = time.monotonic() + 120
        while words not in self.output.read_text():
            assert time.monotonic() < end and self.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        """Send it to a program that has not been waited for."""
        if self.returncode is None:
            os.kill(self.pid, number)


@pytest.fixture
def start_tiny(warm: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Fork]]:
    """Start tiny.py as a process of its own; all are ended after the test, with what they started."""
    started = []

    def start(run_dir: Path, **options: Any) -> Fork:
        output = tmp_path_factory.mktemp("said") / "said.txt"
        started.append(Fork(warm, [str(TINY), str(run_dir), json.dumps(options)], output))
        return started[-1]

    start.started = started
    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def ranks(start_tiny: Callable[..., Fork], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Fork]]:
    """Start tiny.py as the ranks of one world; ``own``: what a rank has in place of these options."""
    stores = []

    def start(run_dir: Path, world: int, own: Mapping[int, Mapping[str, Any]] = {}, **options: Any) -> list[Fork]:
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(stores[-1].port))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("WORLD_SIZE", str(world))
        started = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            started.append(start_tiny(run_dir, **options | own.get(rank, {})))
        return started

    return start


@pytest.fixture(scope="session")
def finished() -> Callable[..., tuple[list[int], list[str]]]:
    """Wait for processes: their exit codes, and what each said."""

    def finish(processes: list[Fork], timeout: float = 120) -> tuple[list[int], list[str]]:
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
