"""``cosmos-launch`` on a real SLURM: two nodes, preemption, requeueing, a lost node, a killed rank, arrays,
cancelling.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

COMMAND = [sys.executable, "-c", "import sys; from cosmos_ssl_launch import main; sys.exit(main())"]
STEPS = 40
RUN = ["data.train_samples=64", "data.validation_samples=16", "training.batch_size=16", f"schedule.max_steps={STEPS}"]
RUN += [
    "schedule.epochs=100",
    "model.image.layers=1",
    "model.text.layers=1",
    "model.text.width=32",
    "evaluators=null",
    "loader.workers=1",
]
RUN += ["logging.every_steps=1", "logging.tensorboard=false", "checkpoints.keep_last=1"]
PROFILE = """\
kind: slurm
nodes: 2
cpus_per_task: 2
mem: 1G
time: 00:10:00
signal_delay_s: 20
environment: {OMP_NUM_THREADS: 1}
"""


class Runs:
    """Queues runs from a folder and looks at what becomes of them."""

    def __init__(self, slurm: Any, folder: Path) -> None:
        self.slurm = slurm
        self.folder = folder
        (folder / "two.yaml").write_text(PROFILE)

    def launch(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_CONF": str(self.slurm.config)}
        environment.pop("COSMOS_PROFILE", None)
        return subprocess.run(
            [*COMMAND, *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )

    def queue(self, name: str, *words: str) -> str:
        """Queue a run; the id of its job."""
        data = f"data.folder={self.folder}/scenes"
        done = self.launch("--config", "quickstart", "--profile", "two.yaml", f"name={name}", data, *RUN, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        match = re.match(r"queued as job (\S+),( a chain with [\d, ]+,)? on 2 x 1 ranks, into runs/", done.stdout)
        assert match is not None, done.stdout
        return match[1]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of metrics without what the clock has a part in; also while the last one is being written."""
        path = self.run(name) / "metrics.jsonl"
        lines = (
            [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if path.exists()
            else []
        )
        timed = ("samples_per_second", "data_wait", "gpu_wait", "memory", "mfu", "slowest_rank", "slowest_rank_lag")
        return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}\n{self.said()}"
            time.sleep(0.1)

    def wait_for_step(self, name: str, step: int) -> None:
        self.wait_for(lambda: len(self.rows(name)) >= step, f"step {step} of {name}")

    def said(self) -> str:
        """The ends of all logs."""
        logs = sorted(self.folder.glob("runs/*/*_log.out")) + sorted(self.folder.glob("runs/*/slurm/*_log.out"))
        return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in logs)

    def completes(self, job: str, seconds: float = 150) -> dict[str, str]:
        """Wait until a job has ended, successfully."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
        self.wait_for(lambda: self.slurm.job(job)["JobState"] in ends, f"the end of job {job}", seconds)
        found: dict[str, str] = self.slurm.job(job)
        assert found["JobState"] == "COMPLETED", f"{found}\n{self.said()}"
        return found


@pytest.fixture(scope="module")
def runs(slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(slurm, tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> list[dict[str, Any]]:
    """What a run of two nodes that nothing happens to logs."""
    runs.completes(runs.queue("undisturbed"))
    rows = runs.rows("undisturbed")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def test_nothing_is_queued_for_a_typo(runs: Runs) -> None:
    words = ["--config", "quickstart", "--profile", "two.yaml", "name=typo"]
    for word, message in (
        ("training.batchsize=8", "Did you mean 'batch_size'?"),
        ("profile.partion=high", "profile.partion: unknown key. Did you mean 'partition'?"),
        ("losses.clip.temprature=1", "unknown option of Clip"),
        ("profile.nodes=3", "cannot be shared by 3 ranks"),
        ("profile.partition=nowhere", "SLURM refused the job: "),
    ):
        done = runs.launch(*words, f"data.folder={runs.folder}/scenes", *RUN, word)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert runs.slurm.queue() == {}


def test_two_nodes(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    """Both ranks have logs, the code is a copy, and the same command again says that the run is finished."""
    [job] = {path.name.split("_")[0] for path in runs.run("undisturbed").glob("slurm/*_log.out")}
    assert (runs.run("undisturbed") / "slurm" / f"{job}_1_log.out").exists()
    assert f"step {STEPS} of {STEPS}" in (runs.run("undisturbed") / "slurm" / f"{job}_0_log.out").read_text()
    status = runs.launch("status", "runs/undisturbed").stdout
    assert f"job         {job}: COMPLETED, exit code 0" in status and f"finished    yes, at step {STEPS}" in status
    again = runs.launch("resume", "runs/undisturbed", "--follow")
    assert again.returncode == 0 and "is finished" in again.stdout, again.stdout + again.stderr


def test_preempted_by_another_partition(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    """SIGUSR2 comes, the run saves and is requeued, and ends with the losses of an undisturbed one."""
    job = runs.queue("preempted")
    runs.wait_for_step("preempted", 2)
    high = [
        "sbatch",
        "--parsable",
        "-p",
        "high",
        "-N2",
        "-c2",
        "--mem=1G",
        "-t1",
        "-o",
        "/dev/null",
        "--wrap",
        "srun sleep 1",
    ]
    urgent = runs.slurm.run(*high)
    runs.completes(urgent)
    ended = runs.completes(job)
    assert ended["Restarts"] == "1" and "SIGUSR2: saved" in runs.said()
    assert runs.rows("preempted") == undisturbed


def test_a_killed_rank_and_a_lost_node(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    """SLURM requeues the job of a lost node, but not one that failed: there the batch script does."""
    job = runs.queue("crashed", "checkpoints.every_steps=2")
    runs.wait_for_step("crashed", 4)
    os.kill(rank_process(job, 1), signal.SIGKILL)
    runs.slurm.wait_for(job, "PENDING", 60)
    assert f"exit code 137: job {job} is requeued" in (runs.run("crashed") / "slurm" / f"{job}_0_log.out").read_text()
    runs.slurm.wait_for(job, "RUNNING", 60)
    before = runs.rows("crashed")[-1]["step"]
    runs.wait_for(lambda: runs.rows("crashed")[-1]["step"] > before + 2, "the restart")
    runs.slurm.node("n2", "down")
    try:
        runs.slurm.wait_for(job, "PENDING", 60)
    finally:
        runs.slurm.node("n2", "resume")
    assert runs.completes(job)["Restarts"] == "2"
    assert runs.rows("crashed") == undisturbed


def rank_process(job: str, rank: int) -> int:
    """The process of one rank of a job."""
    wanted = (f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            is_worker = b"_submit" in Path(f"/proc/{parent}/cmdline").read_bytes()
        except OSError:
            continue
        if all(word in environment for word in wanted) and b"submitit.core._submit" in command and not is_worker:
            return int(process.name)
    raise AssertionError(f"rank {rank} of job {job} has no process")


def test_requeued_by_hand_then_cancelled_then_resumed(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    """SIGTERM saves.

    A requeued job goes on, a cancelled one stays cancelled, and while it runs nothing else is queued for its folder.
    """
    job = runs.queue("moved")
    runs.wait_for_step("moved", 2)
    runs.slurm.run("scontrol", "requeue", job)
    runs.slurm.wait_for(job, "PENDING", 60)
    log = runs.run("moved") / "slurm" / f"{job}_0_log.out"
    assert "SIGTERM: saved" in log.read_text()
    before = runs.rows("moved")[-1]["step"]
    runs.wait_for_step("moved", before + 2)
    twice = runs.launch("resume", "runs/moved")
    assert twice.returncode == 2 and f"has job {job} (RUNNING)" in twice.stderr
    done = runs.launch("cancel", "runs/moved")
    assert done.returncode == 0, done.stderr
    runs.wait_for(lambda: job not in runs.slurm.queue(), "the end of the job")
    assert log.read_text().count("SIGTERM: saved") == 2
    followed = runs.launch("resume", "runs/moved", "--follow")
    assert followed.returncode == 0 and f"step {STEPS} of {STEPS}" in followed.stdout, followed.stdout + followed.stderr
    assert runs.slurm.job(job)["JobState"] == "CANCELLED" and runs.slurm.job(job)["Restarts"] == "1"
    assert runs.rows("moved") == undisturbed


def test_a_chain(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    """The time of the first job is nearly up: it saves and is not requeued, the second ends the run, the third has
    nothing to do.
    """
    first = runs.queue("chained", "profile.chain=3")
    jobs = [str(int(first) + number) for number in range(3)]
    runs.wait_for_step("chained", 2)
    status = runs.launch("status", "runs/chained").stdout
    assert f"job         {first}: RUNNING\nchain       job 1 of 3, 2 after it: {', '.join(jobs[1:])}\n" in status
    runs.slurm.run("scancel", "--signal=USR2", first)
    for job in jobs[1:]:
        assert runs.completes(job)["Restarts"] == "0"
    ended = runs.slurm.job(first)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0"), ended
    assert "of the chain ends at once: the run is finished" in runs.said()
    assert not (runs.run("chained") / "slurm" / f"{jobs[2]}_1_log.out").exists()  # no rank was started
    status = runs.launch("status", "runs/chained").stdout
    assert "chain       3 jobs, none is left: the run is finished\n" in status
    assert runs.rows("chained") == undisturbed


def test_an_array_of_two_configs(runs: Runs) -> None:
    """One of them is told that its time is up while it starts: it alone is requeued."""
    for name in ("first", "second"):
        (runs.folder / f"{name}.yaml").write_text(
            f"extends: quickstart\nname: {name}\ntraining: {{seed: {len(name)}}}\n"
        )
    words = ["profile.nodes=1", "schedule.max_steps=4", f"data.folder={runs.folder}/scenes"]
    short = [word for word in RUN if not word.startswith("schedule.max_steps")]
    done = runs.launch("--config", "first.yaml", "second.yaml", "--profile", "two.yaml", *short, *words)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"queued as job (\d+_\d), on 1 x 1 ranks, into runs/(\w+)", done.stdout)
    assert [name for _, name in jobs] == ["first", "second"] and [job.partition("_")[2] for job, _ in jobs] == [
        "0",
        "1",
    ]
    runs.wait_for((runs.run("first") / "slurm" / "starts").exists, "the start of the first")
    runs.slurm.run("scancel", "--signal=USR2", jobs[0][0])
    for job, name in jobs:
        assert runs.completes(job)["Restarts"] == ("1" if name == "first" else "0")
        assert len(runs.rows(name)) == 4
        assert f"job         {job}: COMPLETED" in runs.launch("status", f"runs/{name}").stdout
    assert runs.rows("first") != runs.rows("second")


def test_a_run_that_fails_is_not_started_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank fails by itself: its exit code is the job's, although srun has killed the other."""
    (runs.folder / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(runs.folder))
    job = runs.queue("faulty", "teacher.type=python:faulty.Faulty")
    monkeypatch.delenv("PYTHONPATH")
    runs.slurm.wait_for(job, "FAILED", 60)
    assert runs.slurm.job(job)["ExitCode"] == "2:0" and runs.slurm.job(job)["Restarts"] == "0", runs.said()
    assert "no second step here" in (runs.run("faulty") / "slurm" / f"{job}_1_log.out").read_text()
    assert "2 rank 1" in (runs.run("faulty") / "slurm" / "ended").read_text()
    assert (runs.run("faulty") / "code" / "faulty.py").exists()


FAULTY = '''"""A teacher that fails on one rank."""
import os

from cosmos_ssl.api import Teacher


class Faulty(Teacher):
    """Fails on the second rank."""

    def __init__(self, spec):
        super().__init__()

    def update(self, student, progress):
        if os.environ["RANK"] == "1" and progress.step == 2:
            raise RuntimeError("no second step here")
        return {}
'''
