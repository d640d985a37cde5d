"""Several ranks on this machine: started together, told of signals together, ended together."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import IO

from cosmos_ssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LOST, EXIT_SAVED, EXIT_USER, STOOD_STILL

GRACE = 20.0
"""Seconds that the other ranks have to end by themselves once one has failed."""

STUCK = 10.0
"""Seconds after which a rank that is killed and has not ended is left behind: it waits in the system (state D)."""

PARENT = "COSMOS_LAUNCH_PARENT"
"""Names the process that has started a rank."""
_RANK = f"""
import sys
try:
    from cosmos_ssl_launch.local import rank_main
    sys.exit(rank_main())
except KeyboardInterrupt:  # while it imports, or a second one
    sys.exit({EXIT_INTERRUPTED})
"""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_TELLING = (EXIT_USER, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SAVED, EXIT_LOST)
"""Of several exit codes the first one here is the run's: a lost rank is what the others see of one that failed."""


def run_ranks(arguments: Sequence[str], count: int, folder: Path, program: str = "cosmos_ssl_launch") -> int:
    """Run ``cosmos-launch``, or the ``main`` of another module, with these arguments as ``count`` ranks of one world,
    which train into ``folder``; the run's exit code.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    began = time.time()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # held here: no rank has to be first
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    with ExitStack() as stack:
        said = [
            stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")) for _ in range(count)
        ]
        try:
            for rank in range(count):
                ranks.append(_start(program, arguments, rank, count, store.port, said[rank] if rank else None))
            codes = _wait(ranks)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
            _reap(ranks)
            for number, handler in before.items():
                signal.signal(number, handler)
        return _outcome(codes, said, folder, began)


def _start(
    program: str, arguments: Sequence[str], rank: int, count: int, port: int, said: IO[str] | None
) -> subprocess.Popen[bytes]:
    """One rank.

    It has a process group of its own, so that a terminal's Ctrl-C reaches it once, by way of this process.
    """
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_PORT": port,
        PARENT: os.getpid(),
    }
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return subprocess.Popen(
        [sys.executable, "-c", _RANK, program, *arguments], env=environment, stdout=said, stderr=said, process_group=0
    )


def rank_main() -> int:
    """Run a program as one rank, bound to the life of the process that started it."""
    program = sys.argv.pop(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[PARENT]):  # it died before the call above
            return EXIT_LOST
    return int(import_module(program).main())


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The exit code of every rank, negative for a signal.

    Once one has failed, the others have ``GRACE`` seconds left. One that even SIGKILL does not end counts as ended by
    it.
    """
    deadline = float("inf")
    while None in [process.poll() for process in ranks]:  # all are asked: the first may wait for one that has ended
        failed = [p.returncode for p in ranks if p.returncode not in (None, EXIT_DONE, EXIT_SAVED, EXIT_INTERRUPTED)]
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for rank, process in enumerate(ranks):
                if process.poll() is None:
                    print(
                        f"rank {rank} has not ended {GRACE:g} s after another one failed, and is killed",
                        file=sys.stderr,
                    )
                    process.kill()
            _reap(ranks)
            for rank, process in enumerate(ranks):
                if process.returncode is None:
                    told = f"rank {rank} (process {process.pid}) is not ended by SIGKILL: it waits in the system, as "
                    print(f"{told}for storage that hangs. It is left behind", file=sys.stderr, flush=True)
            break
        time.sleep(0.05)
    return [-signal.SIGKILL if process.returncode is None else process.returncode for process in ranks]


def _reap(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for ranks that are killed, but not for ever."""
    end = time.monotonic() + STUCK
    while None in [process.poll() for process in ranks] and time.monotonic() < end:
        time.sleep(0.05)


def _outcome(codes: Sequence[int], said: Sequence[IO[str]], folder: Path, began: float) -> int:
    """The code of the run; what the rank that decided it had to say is printed, unless it was the first, which prints
    itself; of ranks that stood still each is named; and where the last collectives are of one that NCCL has ended.
    """
    found = [EXIT_LOST if code < 0 else code for code in codes]
    worst = next((code for code in _TELLING if code in found), max(found))
    aborted = [code == -signal.SIGABRT for code in codes]  # as NCCL's watchdog does; what the others see is a lost rank
    rank = max((rank for rank, code in enumerate(found) if code == worst), key=aborted.__getitem__)
    stood = (
        {} if worst != EXIT_LOST else {number: told for number in range(1, len(said)) if (told := _stood(said[number]))}
    )
    for number, told in stood.items():
        print(f"rank {number}: {told}", file=sys.stderr)
    if worst != EXIT_DONE and rank not in stood and (rank > 0 or codes[0] < 0):
        said[rank].seek(0)
        lines = said[rank].read().strip().splitlines()
        ended = f"by {signal.Signals(-codes[rank]).name}" if codes[rank] < 0 else f"with exit code {codes[rank]}"
        flights = folder / f"nccl_rank{rank}"  # by NCCL's flight recorder (distributed.py)
        fresh = aborted[rank] and flights.exists() and flights.stat().st_mtime >= began
        told = f"; its last collectives are in {flights} (read by torch.distributed.flight_recorder)" if fresh else ""
        print(f"rank {rank} ended {ended}{told}" + (f": {lines[-1]}" if lines else ""), file=sys.stderr)
    return worst


def _stood(said: IO[str]) -> str:
    """Where a rank that stood still says that it stood."""
    said.seek(0)
    return next((line for line in said.read().splitlines() if line.startswith(STOOD_STILL)), "")
