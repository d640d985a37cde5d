"""``cosmos-ssl embed --profile`` on a real SLURM: two nodes, whose job is told that its time is up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cosmos_ssl

pytestmark = pytest.mark.slurm

COMMAND = [sys.executable, "-c", "import sys; from cosmos_ssl.cli import main; sys.exit(main())"]
PROFILE = """\
kind: slurm
nodes: 2
cpus_per_task: 1
mem: 1G
time: 00:10:00
environment: {OMP_NUM_THREADS: 1}
"""
TINY = {
    "extends": "quickstart",
    "model": {"image": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 2}, "embed_dim": 32},
    "data": {"train_samples": 16, "validation_samples": 8},
    "loader": {"workers": 0},
    "schedule": {"max_steps": 1, "warmup_steps": 1},
    "training": {"batch_size": 8},
    "evaluators": None,
    "logging": {"tensorboard": False},
}


def test_embeddings_of_two_nodes_go_on_after_the_time_is_up(slurm: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    cosmos_ssl.train(tmp_path / "tiny.json", [f"output_dir={tmp_path}/run", f"data.folder={tmp_path}/scenes"])
    (tmp_path / "two.yaml").write_text(PROFILE)
    (tmp_path / "texts.txt").write_text("".join(f"text {n}\n" for n in range(8192)))

    def embed(out: str, *words: str) -> str:
        base = ["embed", "--checkpoint", "run", "--data", "texts.txt", "--output", out, "--batch-size", "8"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_CONF": str(slurm.config)}
        done = subprocess.run(
            [*COMMAND, *base, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait_for(condition: Any) -> None:
        end = time.monotonic() + 90
        while not condition():
            logs = tmp_path.glob("*.slurm/slurm/*_log.out")
            assert time.monotonic() < end, "\n".join(path.read_text()[-1500:] for path in logs)
            time.sleep(0.1)

    embed("one.npy")
    told = re.match(
        r"queued cosmos-ssl embed as job (\d+), on 2 x 1 ranks\n", embed("two.npy", "--profile", "two.yaml")
    )
    assert told is not None
    parts = tmp_path / "two.npy.parts"
    wait_for(lambda: len(list(parts.glob("*.pt"))) >= 3)
    slurm.run("scancel", "--signal=USR2", told[1])
    wait_for(lambda: slurm.job(told[1])["Restarts"] == "1")
    wait_for(lambda: slurm.job(told[1])["JobState"] not in ("RUNNING", "PENDING", "REQUEUED", "COMPLETING"))
    log = (tmp_path / "two.npy.slurm" / "slurm" / f"{told[1]}_0_log.out").read_text()
    assert slurm.job(told[1])["JobState"] == "COMPLETED", log
    kept = re.search(r"([\d,]+) of 8,192 samples had been embedded before", log)
    assert kept is not None and int(kept[1].replace(",", "")) >= 24
    for ending in ("npy", "keys.txt", "meta.json"):
        assert (tmp_path / f"two.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes()
