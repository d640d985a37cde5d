"""What becomes of a run under torchrun when torchrun is told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RUN = [
    "data.train_samples=64",
    "data.validation_samples=16",
    "training.batch_size=16",
    "schedule.epochs=10000",
    "evaluators=null",
]
RUN += [
    "model.image.layers=1",
    "model.text.layers=1",
    "model.text.width=32",
    "loader.workers=1",
    "logging.every_steps=1",
]
CODE = "import sys; from cosmos_ssl_launch import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Two ranks under torchrun, some steps into a run without end."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--signals-to-handle=SIGTERM,SIGUSR2",
        "--no-python",
    ]
    command += [
        sys.executable,
        "-c",
        CODE,
        "--config",
        "quickstart",
        "output_dir=run",
        f"data.folder={tmp_path}/scenes",
        *RUN,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 120
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_what_it_passes_on_is_a_signal_to_save(
    torchrun: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    torchrun.send_signal(number)
    said, _ = torchrun.communicate(timeout=90)
    assert torchrun.returncode == 1
    assert said.count(f"{number.name}: saved run at step ") == 2, said
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert f"at step {int(checkpoint.name[5:]):,} " in said
