"""A process with a CUDA device that is not there: for fake tensors, which have all of a tensor but its numbers.

PyTorch asks for a device's guard and hooks once, while it is imported. So ``fake_device.cpp`` is loaded before that, in
a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any

from cosmos_ssl.errors import CosmosError, UserError, first_line
from cosmos_ssl.files import part_name, storage_faults

KNOWN = ("2.13",)
"""Versions of PyTorch whose guard and hooks ``fake_device.cpp`` fits."""
_ANOTHER = f"Use PyTorch {KNOWN[-1]} as built for the CPU, in an environment of its own"
_SOURCE = Path(__file__).with_name("fake_device.cpp")


@contextmanager
def fake_device() -> Iterator[Callable[..., Any]]:
    """A process with the device while entered: ``run(function, *arguments)`` calls a function of a module there.

    What it raises is raised here, as RuntimeError unless it is the user's fault. Raises UserError where no such device
    can be made.
    """
    library = build()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return process.submit(_called, function, *args, **kwargs).result()

        try:
            run(_load, library)
        except BrokenProcessPool as error:
            raise UserError(
                f"{_none(importlib.metadata.version('torch'))}: its process has died. {_ANOTHER}"
            ) from error
        yield run


def build() -> Path:
    """The compiled ``fake_device.cpp``, in the cache folder; compiled where it is not yet there (15 s).

    Raises UserError where it cannot be, or is not known to fit.
    """
    version = importlib.metadata.version("torch")
    if ".".join(version.split(".")[:2]) not in KNOWN:
        raise UserError(f"{_none(version)}: it is known for {', '.join(KNOWN)} alone. {_ANOTHER}")
    from cosmos_ssl.data.cache import cache_root, lock

    key = hashlib.sha256(f"{version} {sys.platform}".encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    library = cache_root() / "fake_device" / f"{key}.so"
    with lock(library.with_suffix(".lock")):
        if not library.exists():
            with storage_faults(f"{library} cannot be written"):
                library.parent.mkdir(parents=True, exist_ok=True)
                _compile(library)
    return library


def _compile(library: Path) -> None:
    compiler = which("g++")
    if compiler is None:
        raise UserError("a CUDA device that is not there needs a C++ compiler, and there is no g++. Install it (g++)")
    torch, made = _torch(), part_name(library.parent)
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", str(_SOURCE), "-o", str(made)]
    command += [f"-I{torch}/include", f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise UserError(f"g++ cannot compile {_SOURCE.name} for a CUDA device that is not there: {reason}")
    made.replace(library)


def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function``; PyTorch's own errors may hold what cannot be sent to another process."""
    try:
        return function(*args, **kwargs)
    except CosmosError:
        raise
    except Exception as error:
        raise RuntimeError("".join(traceback.format_exception(error))) from None


def _torch() -> Path:
    """Where PyTorch lies, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _none(version: str) -> str:
    return f"a CUDA device that is not there cannot be had with PyTorch {version}"


def _load(library: Path) -> None:
    """In the process of its own: make the device, and try it. Raises UserError."""
    assert "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    loaded.cosmos_ssl_guard()
    for name, answer in _answers().items():
        setattr(torch.cuda, name, answer)
    try:
        with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
            layer = torch.nn.Linear(2, 2, device="cuda")
            layer(torch.ones(1, 2, device="cuda")).sum().backward()
    except Exception as error:
        raise UserError(f"{_none(torch.__version__)}: {first_line(error)}. {_ANOTHER}") from error


# ---------------------------------------------------------------------------- what torch.cuda says


class Event:
    """Of a device that has done everything as soon as it is asked for."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, stream: object = None) -> None:
        """Nothing to remember."""

    def wait(self, stream: object = None) -> None:
        """The device waits, not the host."""

    def query(self) -> bool:
        """It has been reached."""
        return True

    def synchronize(self) -> None:
        """The host waits."""
        _synchronize()

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds."""
        return 0.0


class Stream(Event):
    """The only stream."""

    def wait_event(self, event: Event) -> None:
        """The device waits, not the host."""

    wait_stream = wait_event

    def record_event(self, event: Event | None = None) -> Event:
        """A place in the stream."""
        return event or Event()


def _synchronize(device: object = None) -> None:
    from cosmos_ssl.cost.count import Count

    Count.note_wait("synchronize")


def _answers() -> dict[str, Any]:
    """Return what ``torch.cuda`` answers, by name."""
    import torch

    state = torch.zeros(16, dtype=torch.uint8)
    return {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "manual_seed_all": lambda seed: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=80 << 30),
        "get_device_name": lambda device=None: "a CUDA device that is not there",
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: state,
        "set_rng_state": lambda new, device=None: None,
        "synchronize": _synchronize,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
    }
