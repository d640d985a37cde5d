"""A SLURM of two nodes for the tests of this folder. Where it cannot be started they fail, with what is to be done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "slurm_local.py"


class Slurm:
    """The cluster whose files lie in ``folder``: nodes n1 and n2, partitions low (the default) and high."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"

    def tool(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Call ``tools/slurm_local.py`` for this cluster."""
        command, *options = words
        return subprocess.run(
            [sys.executable, TOOL, command, "--folder", self.folder, *options],
            capture_output=True,
            text=True,
            timeout=120,
        )

    def run(
        self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> str:
        """The output of a command that has SLURM_CONF, without the last line's end.

        Fails the test where the command fails.
        """
        environment = {**os.environ, **(env or {}), "SLURM_CONF": str(self.config)}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.rstrip("\n")

    def queue(self) -> dict[str, str]:
        """States of the jobs that have not ended, by job id (``5_0`` for a task of an array)."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` tells of a job, also of one that has ended: JobState, Restarts, ExitCode,
        BatchHost, ...
        """
        words = self.run("scontrol", "-o", "show", "job", job_id).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def wait_for(self, job_id: str, states: str | Collection[str], timeout: float = 30) -> str:
        """Wait until a job is in one of the states, and return that. Fails the test after ``timeout`` seconds."""
        wanted = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + timeout
        while (state := self.job(job_id)["JobState"]) not in wanted:
            if time.monotonic() > end:
                log = (self.folder / "log" / "slurmctld").read_text().splitlines()[-30:]
                pytest.fail(
                    "\n".join(
                        (
                            f"job {job_id} is {state} after {timeout} s, not {' or '.join(wanted)}",
                            str(self.job(job_id)),
                            *log,
                        )
                    )
                )
            time.sleep(0.1)
        return state

    def node(self, name: str, state: str) -> None:
        """Take a node away, or bring it back with ``"resume"``, and wait until SLURM says so.

        ``"down"``: an operator does it, and SLURM ends the job there. ``"lost"``: all that runs there ends at once, as
        in a power cut, and SLURM is told, which would find it out after a minute.
        """
        assert state in ("down", "lost", "resume")
        if state == "lost":
            self._kill_all_on(name)
        if state == "resume":
            started = self.tool("start")
            assert started.returncode == 0, started.stderr
        else:  # DOWN ends the job there; alone it would end when the node next reports, or an earlier report is read
            for word in ("DOWN", "DRAIN"):
                self.run("scontrol", "update", f"NodeName={name}", f"State={word}", "Reason=test")
        if state == "resume" and self._is_away(name):
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        end = time.monotonic() + 30
        while self._is_away(name) != (state != "resume"):
            assert time.monotonic() < end, self.run("scontrol", "show", "node", name)
            time.sleep(0.1)

    def _is_away(self, name: str) -> bool:
        """Whether SLURM gives a node no jobs."""
        return self.run("sinfo", "-hN", "-n", name, "-p", "low", "-o", "%t").startswith(("down", "drain", "drng"))

    def _kill_all_on(self, name: str) -> None:
        """Kill a node's slurmd, the steps, and the processes of jobs."""
        ours = {f"SLURM_CONF={self.config}".encode(), f"SLURMD_NODENAME={name}".encode()}
        found = True
        while found:
            found = False
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # it has ended meanwhile
                    words = (process / "environ").read_bytes().split(b"\0")
                    daemon = (process / "exe").readlink().name.startswith(("slurmd", "slurmstepd"))
                    if ours <= set(words) or (
                        daemon
                        and self.folder / "log" / name in [file.readlink() for file in (process / "fd").iterdir()]
                    ):
                        os.kill(int(process.name), signal.SIGKILL)
                        found = True


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A running cluster; SLURM_CONF is set. Fails, and never skips, where the packages or root's rights are missing."""
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    started = cluster.tool("start")
    if started.returncode:
        pytest.fail(started.stderr.strip(), pytrace=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.config))
        yield cluster
    stopped = cluster.tool("stop")
    assert stopped.returncode == 0, stopped.stderr


@pytest.fixture(autouse=True)
def _leave_it_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test on the session's cluster: no jobs, and both nodes in service."""
    yield
    if "slurm" not in request.fixturenames:
        return
    slurm: Slurm = request.getfixturevalue("slurm")
    if jobs := slurm.queue():
        slurm.run("scancel", *jobs)
    end = time.monotonic() + 45  # 30 of them until SLURM kills what ignores SIGTERM
    while slurm.queue():
        assert time.monotonic() < end, slurm.queue()
        time.sleep(0.1)
    for name in ("n1", "n2"):
        if slurm._is_away(name):
            slurm.node(name, "resume")
