"""tools/slurm_local.py: its commands, and that the cluster preempts, requeues, loses nodes and cancels as a big one
does.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slurm
TOOL = Path(__file__).resolve().parents[2] / "tools" / "slurm_local.py"
DAEMONS = ("munged", "slurmctld", "n1", "n2")

# Tells of its starts and of USR2, at which it leaves, in one file a rank; ends by itself when it is started again.
WAITING = r"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --time=60 --requeue --open-mode=append
srun --kill-on-bad-exit=1 bash -c '
    trap "echo USR2 >> told.$SLURM_PROCID; exit 0" USR2
    echo "start ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME" >> told.$SLURM_PROCID
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit 0
    while :; do sleep 0.1; done'
"""
STUBBORN = (
    '#!/bin/bash\n#SBATCH --nodes=2\nsrun bash -c \'trap "" TERM; touch running.$SLURM_PROCID; while :; '
    "do sleep 0.1; done'\n"
)


class Script:
    """A folder with a job's script in it, and what its ranks told."""

    def __init__(self, folder: Path, text: str = WAITING) -> None:
        self.folder = folder
        (folder / "job.sh").write_text(text)

    def submit(self, slurm: Any, *options: str) -> str:
        """Queue it; the job id."""
        return str(slurm.run("sbatch", "--parsable", *options, "job.sh", cwd=self.folder))

    def told(self) -> list[list[str]]:
        """The lines of each rank so far."""
        return [path.read_text().splitlines() for path in sorted(self.folder.glob("told.*"))]

    def wait_until_started(self, ranks: int = 2, pattern: str = "told.*") -> None:
        """Wait until so many ranks have made their file."""
        end = time.monotonic() + 30
        while len(list(self.folder.glob(pattern))) < ranks:
            assert time.monotonic() < end, list(self.folder.iterdir())
            time.sleep(0.05)


TWICE = [["start 0 on n1", "start 1 on n1"], ["start 0 on n2", "start 1 on n2"]]
TWICE_TOLD = [[first, "USR2", second] for first, second in TWICE]

# ---------------------------------------------------------------------------- jobs


def test_srun_on_two_nodes(slurm: Any, tmp_path: Path) -> None:
    script = Script(
        tmp_path,
        "#!/bin/bash\n#SBATCH -N2 --ntasks-per-node=2 -o out\nsrun -l bash -c 'echo $SLURMD_NODENAME $SLURM_LOCALID'\n",
    )
    job = script.submit(slurm)
    slurm.wait_for(job, "COMPLETED")
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["0: n1 0", "1: n1 1", "2: n2 0", "3: n2 1"]
    assert slurm.job(job)["Partition"] == "low"


def test_high_preempts_low_which_hears_usr2_and_comes_back(slurm: Any, tmp_path: Path) -> None:
    """A job that leaves at the signal is requeued, though it ended with 0.

    One that stays is killed after GraceTime and up to 30 s more, as SLURM looks every 30 s, and its next end, with 0
    too, requeues it once more.
    """
    script = Script(tmp_path)
    low = script.submit(slurm, "--signal=USR2@20")
    script.wait_until_started()
    high = slurm.run("sbatch", "--parsable", "-p", "high", "-N2", "-c2", "-o", tmp_path / "high", "--wrap", "sleep 1")
    slurm.wait_for(high, ("RUNNING", "COMPLETED"), 60)
    assert script.told() == [told[:2] for told in TWICE_TOLD]
    slurm.wait_for(low, "COMPLETED", 45)
    assert script.told() == TWICE_TOLD
    assert slurm.job(low)["Restarts"] == "1"


def test_requeued_by_hand(slurm: Any, tmp_path: Path) -> None:
    script = Script(tmp_path)
    job = script.submit(slurm)
    script.wait_until_started()
    slurm.run("scontrol", "requeue", job)
    slurm.wait_for(job, "COMPLETED")
    assert script.told() == TWICE


@pytest.mark.parametrize(("how", "pause"), [("down", 0), ("lost", 7)])  # it may start again after 6 s
def test_a_job_whose_node_goes_is_requeued_and_waits_for_it(slurm: Any, tmp_path: Path, how: str, pause: int) -> None:
    script = Script(tmp_path)
    job = script.submit(slurm)
    script.wait_until_started()
    slurm.node("n2", how)
    slurm.wait_for(job, "PENDING")
    time.sleep(pause)
    assert slurm.job(job)["JobState"] == "PENDING"
    slurm.node("n2", "resume")
    slurm.wait_for(job, "COMPLETED")
    assert script.told() == TWICE


def test_cancelled_stays_cancelled(slurm: Any, tmp_path: Path) -> None:
    script = Script(tmp_path)
    job = script.submit(slurm)
    script.wait_until_started()
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    time.sleep(7)  # longer than a requeued one waits
    assert (slurm.job(job)["JobState"], slurm.queue()) == ("CANCELLED", {})
    assert script.told() == [told[:1] for told in TWICE]


def test_a_job_with_more_memory_than_a_node_is_refused(slurm: Any) -> None:
    done = subprocess.run(["sbatch", "--mem=900G", "--wrap", "true"], capture_output=True, text=True)
    assert done.returncode == 1 and "Memory specification can not be satisfied" in done.stderr


# ---------------------------------------------------------------------------- start, stop, status


@pytest.fixture
def second(slurm: Any, tmp_path: Path) -> Iterator[Any]:
    """Another cluster, beside the session's; not started."""
    cluster = type(slurm)(tmp_path / "c")
    yield cluster
    cluster.tool("stop")


def pids(cluster: Any) -> dict[str, int]:
    """The process ids that the daemons of a cluster wrote."""
    return {name: int((cluster.folder / "pid" / name).read_text()) for name in DAEMONS}


def processes_of(cluster: Any) -> list[str]:
    """Command lines of the living processes that name the cluster's folder in their arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(cluster.folder).encode() in words + environment and int(process.name) != os.getpid():
            found.append(words.replace(b"\0", b" ").decode())
    return found


def test_start_status_stop(slurm: Any, second: Any, tmp_path: Path) -> None:
    first = pids(slurm)
    assert second.tool("status").returncode == 1
    started = second.tool("start")
    assert (started.returncode, started.stdout) == (0, f"export SLURM_CONF={second.config}\n"), started.stderr
    before, status = pids(second), second.tool("status")
    assert status.returncode == 0 and all(str(pid) in status.stdout for pid in before.values())
    assert [status.stdout.count(word) for word in ("idle", "low", "high", "down")] == [2, 1, 1, 0]
    again = second.tool("start")
    assert (again.returncode, again.stdout, pids(second)) == (0, started.stdout, before)

    os.kill(before["n2"], signal.SIGKILL)
    status = second.tool("status")
    assert status.returncode == 1 and status.stdout.count("down") == 1
    assert second.tool("start").returncode == 0 and second.tool("status").returncode == 0
    assert {name for name, pid in pids(second).items() if pid != before[name]} == {"n2"}

    script = Script(tmp_path, STUBBORN)
    script.submit(second)
    script.wait_until_started(pattern="running.*")
    stopped = second.tool("stop")
    assert (stopped.returncode, stopped.stderr, processes_of(second)) == (0, "", [])
    assert second.tool("status").returncode == 1
    again = second.tool("stop")
    assert again.returncode == 0 and "nothing runs" in again.stderr
    assert pids(slurm) == first and slurm.tool("status").returncode == 0


def test_start_after_a_crash(second: Any, tmp_path: Path) -> None:
    assert second.tool("start").returncode == 0
    script = Script(tmp_path, STUBBORN)
    script.submit(second)
    script.wait_until_started(pattern="running.*")
    for pid in pids(second).values():
        os.kill(pid, signal.SIGKILL)
    with subprocess.Popen(["sleep", "100"]) as other:  # the system has given a daemon's number to another program
        (second.folder / "pid" / "n1").write_text(f"{other.pid}\n")
        (second.folder / "pid" / "n2").write_text("nonsense")
        assert second.tool("status").returncode == 1
        started = second.tool("start")
        assert started.returncode == 0, started.stderr
        assert other.poll() is None
        other.kill()
    assert second.queue() == {}
    assert not [line for line in processes_of(second) if "sleep" in line or "slurm_script" in line]
    assert second.run("srun", "-N2", "hostname").count("\n") == 1
    (second.folder / "pid" / "slurmctld").unlink()
    assert second.tool("status").returncode == 0
    assert second.tool("stop").returncode == 0 and processes_of(second) == []


# ---------------------------------------------------------------------------- refusals


@pytest.fixture
def tool() -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("slurm_local", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_missing_is_named(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "SEARCH", str(tmp_path))
    assert tool.main(["start", "--folder", str(tmp_path / "c")]) == 2
    line = capsys.readouterr().err
    assert (
        "missing: munged, slurmctld, slurmd" in line
        and "apt-get install -y --no-install-recommends slurm-wlm munge" in line
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert tool.main(["start", "--folder", str(tmp_path / "c")]) == 2
    assert "as root" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_taken_port_and_a_foreign_folder_are_refused(second: Any, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        refused = second.tool("start", "--ports", str(port - 1))
    assert refused.returncode == 2 and f"port {port} is in use or none" in refused.stderr
    (tmp_path / "notes").write_text("mine")
    refused = type(second)(tmp_path).tool("start")
    assert refused.returncode == 2 and "holds other files" in refused.stderr
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_daemon_that_cannot_start_shows_its_log_and_leaves_nothing(second: Any) -> None:
    assert second.tool("start").returncode == 0 and second.tool("stop").returncode == 0
    broken = {**os.environ, "PATH": f"{second.folder}:{os.environ['PATH']}"}
    (second.folder / "slurmctld").write_text("#!/bin/sh\necho no state >&2; exit 3\n")
    (second.folder / "slurmctld").chmod(0o755)
    failed = subprocess.run(
        [sys.executable, TOOL, "start", "--folder", second.folder], env=broken, capture_output=True, text=True
    )
    assert failed.returncode == 1 and "slurmctld does not start" in failed.stderr and "no state" in failed.stderr
    assert processes_of(second) == []
