#!/usr/bin/env python3
"""A SLURM of two nodes on one machine, to try things and for tests: python tools/slurm_local.py start|stop|status.

It runs Debian's packages ``slurm-wlm`` and ``munge`` as root, without systemd, dbus or cgroups, also in a container.
Nodes n1 and n2 have 2 CPUs each; jobs of partition ``high`` preempt and requeue those of ``low``, the default.
Configuration, state, logs, pids and munge's key and socket lie in one folder; a SLURM or munge that the machine already
has is left alone. ``start`` prints the line that lets a shell use it: ``eval "$(python tools/slurm_local.py start)"``.
Exit 1 where something is down or failed, 2 where the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sinfo", "squeue", "scancel", "sbatch", "srun")
PACKAGES = ("slurm-wlm", "munge")
INSTALL = ("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/bin", "/sbin", "/bin"))
NODES = ("n1", "n2")
FIRST_PORT = 17001
PORTS = len(NODES) + 1  # slurmctld has the last
WAIT = 30.0  # seconds
UP = ("idle", "mixed", "allocated", "completing")
DRAIN = ("drained", "draining")  # someone has said so; the node itself answers
LONGEST = 70  # characters of a folder: sockets of steps lie in it, and the path of a socket has at most 107

CONFIG = """\
# Written by tools/slurm_local.py
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its old credential has expired: 120 s by default
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/%n
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={memory_per_cpu}
# the machine may have fewer CPUs than both nodes together claim
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=5
ReturnToService=2
SlurmdTimeout=20
JobRequeue=1
# without accounting, a job that has ended is known only as long as this
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 \
 Port=[{first_port}-{last_port}] CPUs=2 RealMemory={memory} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=15 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
MARK = CONFIG.splitlines()[0]


class Refused(Exception):
    """The command cannot be carried out; its text says in one line why and what to do."""


class Failed(Exception):
    """Something that was started does not run; its text holds the ends of the logs."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """One of the daemons: its name (a slurmd has its node's), the command that starts it, the file of its process
    id.
    """

    name: str
    command: tuple[str, ...]
    pid_file: Path

    def pid(self) -> int | None:
        """Its process id: that in its file if the process is this daemon, else, the file being stale or gone, one that
        is.
        """
        with suppress(OSError, ValueError):
            if self.is_process(Path("/proc") / str(int(self.pid_file.read_text()))):
                return int(self.pid_file.read_text())
        return next(iter(processes(self.is_process)), None)

    def is_process(self, process: Path) -> bool:
        """Return whether a folder of /proc is that of this daemon, alive: same program, same arguments, so of the same
        cluster.
        """
        program, *words = (process / "cmdline").read_bytes().split(b"\0")
        return Path(os.fsdecode(program)).name == self.command[0] and words[:-1] == [
            os.fsencode(word) for word in self.command[1:]
        ]

    def end(self) -> None:
        """End it: SIGTERM, after 10 s SIGKILL."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if (pid := self.pid()) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, sign)
                until(lambda: self.pid() is None, 10)
        self.pid_file.unlink(missing_ok=True)


class Cluster:
    """The cluster whose files lie in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.config = self.folder / "slurm.conf"
        files = {
            "socket": "munge/socket",
            "key-file": "munge/key",
            "seed-file": "munge/seed",
            "log-file": "log/munged",
            "pid-file": "pid/munged",
        }
        commands = {
            "munged": ("munged", *(f"--{option}={self.folder}/{file}" for option, file in files.items()), "--force"),
            "slurmctld": ("slurmctld", "-f", str(self.config)),
            **{node: ("slurmd", "-N", node, "-f", str(self.config)) for node in NODES},
        }
        self.daemons = [Daemon(name, command, self.folder / "pid" / name) for name, command in commands.items()]

    @property
    def running(self) -> dict[str, int]:
        """Process ids of the daemons that run, by name."""
        return {daemon.name: pid for daemon in self.daemons if (pid := daemon.pid()) is not None}

    def ask(self, *command: str) -> str:
        """The output of one of SLURM's commands; empty where it fails, as without a controller."""
        environment = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(self.config)}
        with suppress(subprocess.TimeoutExpired):
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT).stdout
        return ""

    def node_states(self) -> dict[str, str]:
        """State of each node in SLURM's words, with ``*`` for one that does not answer; empty without a controller."""
        if "slurmctld" not in self.running:
            return {}
        return dict(line.split()[:2] for line in self.ask("sinfo", "-hN", "-p", "low", "-o", "%N %T").splitlines())

    def is_up(self, states: Sequence[str] = UP) -> bool:
        """All daemons run and all nodes are in one of the states, by default those that take jobs."""
        nodes = self.node_states()
        return len(self.running) == len(self.daemons) and all(nodes.get(node) in states for node in NODES)

    # ------------------------------------------------------------------------ start

    def start(self, ports: int | None) -> None:
        """Start what does not run yet, and wait until all nodes are up.

        Where nothing runs, what an earlier cluster left, one that was killed too, is cleared first. Raises Refused and
        Failed.
        """
        running = self.running
        if not running:
            self._clear()
            self._write(ports if ports is not None else free_ports())
        elif ports not in (None, self._first_port()):
            raise Refused(f"the cluster in {self.folder} runs, with ports from {self._first_port()}; stop it first")
        try:
            for daemon in self.daemons:
                if daemon.name not in running:
                    self._launch(daemon)
            if len(running) < len(self.daemons) and not until(lambda: self.is_up((*UP, *DRAIN)), WAIT):
                raise Failed(
                    f"not up after {WAIT:.0f} s: daemons {self.running}, nodes {self.node_states()}\n{self.logs()}"
                )
        except Failed:
            if not running:
                self.stop()
            raise

    def _launch(self, daemon: Daemon) -> None:
        """Start a daemon and wait until its first process has put it in the background."""
        daemon.pid_file.unlink(missing_ok=True)
        environment = {"PATH": SEARCH, "SLURM_CONF": str(self.config), "LANG": "C.UTF-8"}
        command = (shutil.which(daemon.command[0], path=SEARCH) or "", *daemon.command[1:])
        with (self.folder / "log" / "start").open("a") as file, suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command, env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=WAIT
            )
            if done.returncode == 0:
                return
        raise Failed(f"{daemon.name} does not start\n{self.logs()}")

    def _clear(self) -> None:
        """Remove the files of an earlier cluster here, and end processes of its jobs."""
        if self.folder.exists():
            if self.folder.stat().st_uid != 0 or self.folder.stat().st_mode & 0o022:
                raise Refused(
                    f"{self.folder} must belong to root and nobody else may write to it; give another --folder"
                )
            if any(self.folder.iterdir()) and not (self.config.is_file() and self.config.read_text().startswith(MARK)):
                raise Refused(f"{self.folder} holds other files; give another --folder")
            self._end_jobs()
        for name in ("state", "spool", "pid", "log", "munge"):
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)

    def _write(self, ports: int) -> None:
        """Write the configuration and munge's key. Raises Refused where a port is taken."""
        if len(str(self.folder)) > LONGEST or any(character in " ,#" for character in str(self.folder)):
            raise Refused(
                f"{self.folder}: at most {LONGEST} characters, without space, comma and #; give another --folder"
            )
        if taken := [port for port in range(ports, ports + PORTS) if not is_free(port)]:
            raise Refused(
                f"port {taken[0]} is in use or none; give the first of {PORTS} free ones in a row with --ports"
            )
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 // len(NODES)  # MiB
        text = CONFIG.format(
            folder=self.folder,
            host=socket.gethostname().partition(".")[0],
            control_port=ports + len(NODES),
            first_port=ports,
            last_port=ports + len(NODES) - 1,
            memory=memory,
            memory_per_cpu=memory // 2,
        )
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        for name in ("state", "pid", "log", "munge", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self.config.write_text(text)

    def _first_port(self) -> int:
        """The first port of the configuration that is there."""
        return int(self.config.read_text().partition(" Port=[")[2].partition("-")[0])

    def logs(self, lines: int = 12) -> str:
        """The last lines of each log."""
        logs = {path: path.read_text(errors="replace").splitlines() for path in sorted((self.folder / "log").iterdir())}
        return "\n".join("\n".join((f"== {path}", *text[-lines:])) for path, text in logs.items())

    # ------------------------------------------------------------------------ stop

    def stop(self) -> bool:
        """End jobs, then daemons. False where nothing ran."""
        running = self.running
        if {"munged", "slurmctld"} <= running.keys() and (jobs := self.ask("squeue", "-h", "-o", "%A").split()):
            self.ask("scancel", *jobs)
            until(lambda: not self.ask("squeue", "-h"), 5)
        self._end_jobs()
        for daemon in reversed(self.daemons):
            daemon.end()
        return bool(running)

    def _end_jobs(self) -> None:
        """Kill processes of jobs that are left: those that ignore SIGTERM, and those whose slurmd was killed."""
        for kind in (self._is_task, self._is_step):
            for _ in range(50):  # until none has started another
                for pid in (found := processes(kind)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if not found:
                    break
                time.sleep(0.1)

    def _is_task(self, process: Path) -> bool:
        """Return whether a folder of /proc is that of a process that a slurmd of this cluster started for a job."""
        words = (process / "environ").read_bytes().split(b"\0")
        return os.fsencode(f"SLURM_CONF={self.config}") in words and any(
            word.startswith(b"SLURMD_NODENAME=") for word in words
        )

    def _is_step(self, process: Path) -> bool:
        """Return whether a folder of /proc is that of a slurmstepd of this cluster."""
        return (process / "exe").readlink().name.startswith("slurmstepd") and (
            process / "cwd"
        ).readlink() == self.folder / "log"

    # ------------------------------------------------------------------------ status

    def status(self) -> str:
        """Daemons, nodes and partitions as text."""
        running = self.running
        lines = [f"SLURM_CONF={self.config}", "", f"{'DAEMON':<12}{'PID':<9}STATE"]
        for name in (daemon.name for daemon in self.daemons):
            title = f"slurmd {name}" if name in NODES else name
            lines.append(f"{title:<12}{running.get(name, '-'):<9}{'up' if name in running else 'down'}")
        if "slurmctld" in running:
            lines += ["", self.ask("sinfo", "-N", "-p", "low", "-o", "%.8N %.11T %.5c %.13m %.20E")]
            lines += [self.ask("sinfo", "-o", "%.10P %.6a %.11l %.14F %.12p")]
        return "\n".join(lines).rstrip()


# ---------------------------------------------------------------------------- processes and ports


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, at most so long; whether it came."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return met


def processes(kind: Callable[[Path], bool]) -> list[int]:
    """Ids of the processes whose folder in /proc is of a kind."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if kind(process):
                found.append(int(process.name))
    return found


def is_free(port: int) -> bool:
    """Return whether a daemon can listen on a port."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True


def free_ports() -> int:
    """The first of PORTS free ports in a row. Raises Refused where there are none."""
    for first in range(FIRST_PORT, 32000, 10):
        if all(is_free(port) for port in range(first, first + PORTS)):
            return first
    raise Refused(f"no free ports from {FIRST_PORT} on; give --ports")


@contextmanager
def alone() -> Iterator[None]:
    """Hold the machine's lock: clusters start one after the other, so that each sees the ports of the one before."""
    with Path(shutil.which("slurmctld", path=SEARCH) or "").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------- the command


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


def require(install: bool) -> None:
    """Raises Refused where it is not root or programs are missing that are not to be, or cannot be, installed."""
    if os.geteuid() != 0:
        raise Refused("SLURM's daemons need root; run this as root")
    if missing() and install:
        script = f"apt-get update && DEBIAN_FRONTEND=noninteractive {shlex.join(INSTALL)}"
        subprocess.run(["sh", "-c", script], stdout=sys.stderr)
    if missing():
        raise Refused(f"missing: {', '.join(missing())}. Install: {shlex.join(INSTALL)} (or: start --install)")


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "start": "start what does not run yet and wait until both nodes are up",
        "stop": "end the jobs and the daemons",
        "status": "show daemons, nodes and partitions; exit 1 where one is down",
    }
    added = {name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()}
    for command in added.values():
        default = Path(tempfile.gettempdir()) / "slurm_local"
        command.add_argument(
            "--folder", type=Path, default=default, help="where all files of the cluster lie (default: %(default)s)"
        )
    added["start"].add_argument(
        "--ports", type=int, help=f"first of {PORTS} in a row (default: the first free ones from {FIRST_PORT})"
    )
    added["start"].add_argument("--install", action="store_true", help="install missing packages by apt-get")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Carry out a command; the exit code."""
    options = arguments(words)
    cluster = Cluster(options.folder)
    try:
        if options.command == "status":
            print(cluster.status())
            return 0 if cluster.is_up() else 1
        require(install=getattr(options, "install", False))
        with alone():
            if options.command == "start":
                cluster.start(options.ports)
                print(
                    f"up: nodes {', '.join(NODES)}; partitions low, high; to end it: stop --folder {cluster.folder}",
                    file=sys.stderr,
                )
                print(f"export SLURM_CONF={shlex.quote(str(cluster.config))}")
            elif not cluster.stop():
                print(f"nothing runs in {cluster.folder}", file=sys.stderr)
    except (Refused, Failed) as error:
        print(f"slurm_local: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
