"""Every benchmark runs, in a tiny form, and writes its rows; what it measures is not judged here, but equality is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
TINY = {
    "bench_step": ["--tiny", "--samples", "2", "--pairs", "1"],
    "bench_data": ["--samples", "128", "--pairs", "1"],
    "bench_loss": ["--times", "1"],
    "bench_run": [
        *("--configs", "compare/cosmos.yaml", "--plain", "compare/cosmos.yaml", "--steps", "1", "model.embed_dim=32"),
        *("model.image.width=64", "model.image.layers=1", "model.text.width=32", "model.text.layers=1"),
        *("data.train_samples=64", "data.validation_samples=32", "training.batch_size=32", "schedule.epochs=2"),
    ],
    "bench_eval": ["--images", "64"],
    "bench_search": ["--sizes", "3000", "--queries", "3", "--engines", "plain", "faiss"],
}
EQUAL = ("difference", "collectives", "bytes moved", "recall")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [*((name, []) for name in TINY), ("bench_step", ["--variants", "clip", "--compile"])]
)
def test_runs_in_a_tiny_form(name, more, tmp_path):
    command = [sys.executable, str(TOOLS / f"{name}.py"), *TINY[name], *more, "--json", str(tmp_path / "rows.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(row.keys() == {"name", "value", "unit", "goal", "ok"} for row in rows)
    assert all(row["ok"] for row in rows if any(word in row["name"] for word in EQUAL))
    assert all(row["name"] in done.stdout for row in rows)


def test_every_benchmark_is_here():
    assert {path.stem for path in TOOLS.glob("bench_*.py")} - {"bench_prepare"} == set(TINY)
