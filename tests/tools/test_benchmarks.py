"""The benchmarks run in a tiny form, and report a failure if the optimized side is the plain one or does nothing."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cosmos_ssl.data import Shards

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
    "bench_prepare": ["--rows", "400", "--small-rows", "200", "--side", "64"],
}
SPEED_AND_MEMORY = ("of linear", "x plain", "x sorting", "of plain", "of the local rate", "times", "x")
"""Units of the rows that a tiny form may fail."""
CPU = torch.device("cpu")


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
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert done.returncode == int(not all(row["ok"] for row in rows)), done.stdout + done.stderr
    assert [row for row in rows if not row["ok"] and row["unit"] not in SPEED_AND_MEMORY] == []
    assert all(row["value"] > 0 for row in rows if row["goal"] and row["goal"].startswith(">"))
    assert all(row["name"] in done.stdout for row in rows)


def test_every_benchmark_is_here():
    names = {path.stem for path in TOOLS.glob("bench_*.py")}
    assert names == set(TINY)
    assert {f"test_{name}_fails" for name in names} <= globals().keys()


# ---------------------------------------------------------------------------- what must fail


@pytest.fixture
def tool(monkeypatch):
    """Import a program of tools/ by name."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def failed(rows):
    return [row["name"] for row in rows if not row["ok"]]


def test_rows_that_measured_nothing_fail(tool, capsys, tmp_path):
    bench = tool("bench")
    empty = [
        bench.make_row("count", 0, at_most=4),
        bench.make_row("nan", float("nan"), more_than=None),
        bench.make_ratio_row("empty sides", 0, 0, at_most=1),
        bench.make_ratio_row("equal no-ops", [1e-6] * 3, [1e-6] * 3, at_least=0.8, sides_more_than=bench.MIN_SECONDS),
        bench.make_duration_row("no-op", 1e-6, "ms", at_most=100),
        bench.make_difference_row("nothing", {}, {}, at_most=1),
        bench.make_difference_row("zeros", {"a": 0.0}, {"a": 0.0}, at_most=1),
        bench.make_difference_row("other names", {"a": 1.0}, {"b": 1.0}, at_most=1),
        bench.make_difference_row("nan", {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": float("nan")}, at_most=1),
    ]
    measured = [
        bench.make_row("replaced samples", 0, more_than=None),
        bench.make_ratio_row("ratio", [1, 4, 9], [1, 2, 3], at_least=2, at_most=2),
        bench.make_difference_row("equal", {"a": 1.0}, {"a": 1.0}, at_most=1e-9),
    ]
    assert failed([*empty, *measured]) == [row["name"] for row in empty]
    assert [bench.report(rows, None) for rows in (measured, [], [*measured, empty[0]])] == [0, 1, 1]
    bench.report(empty, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)[5]["value"] is None
    assert capsys.readouterr().out.count("FAIL") == 1 + len(empty)


def test_bench_step_fails(tool):
    bench_step = tool("bench_step")

    def make_side(step):
        return SimpleNamespace(request=lambda request: bench_step.respond(request, step, CPU))

    def measure(make_step):
        return failed(bench_step.measure("clip", 2, 1, [make_side(make_step()) for _ in range(2)], goals=True))

    plain = measure(bench_step.Work("clip", 2, CPU, bench_step.TINY).plain)
    assert plain == ["clip: speed", "clip: FLOPs", "clip: peak memory"]
    nothing = measure(lambda: dict)
    assert {"clip: samples a second", "clip: FLOPs a sample", "clip: largest difference of losses"} < set(nothing)


def test_bench_data_fails(tool, tmp_path):
    bench_data = tool("bench_data")
    shards = Shards(pattern := bench_data.write_shards(tmp_path, 64, 1), caption_schema="dreamlip")
    shards.prepare()
    plain = bench_data.Plain(shards)
    rows = bench_data.measure_cpu(shards, lambda _: plain.batch(range(4)), lambda batch: None, 1, batch_size=4)
    assert failed(rows) == ["worker side", "whole, with photometric work"]
    rows = bench_data.measure_cpu(shards, lambda _: None, lambda batch: None, 1, batch_size=4)
    assert {"worker side", "worker, time", "whole, time"} <= set(failed(rows))
    assembly = bench_data.make_assembly()
    rows = bench_data.measure_source(assembly, pattern, tmp_path, 1, protocol="", workers=0)
    assert {"late source, requests", "late source, bytes"} <= set(failed(rows))


def gather_every_view(work, rank, world_size):
    """Move each view of images and texts by a collective of its own, in a thread, forward and backward."""

    def run():
        for _ in range(68):
            dist.all_reduce(torch.zeros(8, 64))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def run_nothing(work, rank, world_size):
    """Replace the losses."""


def test_bench_loss_fails(tool, in_ranks):
    bench_loss = tool("bench_loss")
    names = ["collectives a step, both losses", "bytes moved"]
    for replaced in (gather_every_view, run_nothing):
        counted = in_ranks(bench_loss.count_collectives, 1, replaced)[0]
        assert failed(bench_loss.make_collective_rows(counted)) == names
    assert "growth to 8 ranks" in failed(bench_loss.measure_time(1, lambda world_size: lambda: None))
    assert not bench_loss.measure_difference(lambda a, b, scale: torch.zeros(()))["ok"]


def test_bench_eval_fails(tool):
    bench_eval = tool("bench_eval")
    assert failed(bench_eval.measure_metrics(64, bench_eval.compute_plain_metrics)) == ["speed"]
    rows = bench_eval.measure_metrics(64, lambda *inputs: {})
    assert failed(rows) == ["speed", "ours, time", "largest difference"]


def test_bench_search_fails(tool):
    bench_search = tool("bench_search")
    nothing = SimpleNamespace(top=lambda queries, k: [SimpleNamespace(rows=torch.arange(k))] * len(queries))
    rows = bench_search.measure(2000, 3, "none", lambda vectors: nothing)
    assert failed(rows) == [f"none, 2,000 vectors: {name}" for name in ("time", "time by that", "recall")]


def test_bench_prepare_fails(tool, tmp_path):
    bench_prepare = tool("bench_prepare")
    sizes = argparse.Namespace(rows=400, small_rows=200, side=64, workers=1)

    def prepare_plain(table, images, output, workers, *, watched=False):
        bench_prepare.shutil.rmtree(output, ignore_errors=True)
        start = time.monotonic()
        written = bench_prepare.plain_loop(table, images, output)
        return time.monotonic() - start, bench_prepare.private_bytes(os.getpid()), written

    assert "prepare / plain loop" in failed(bench_prepare.measure(tmp_path, sizes, prepare_plain))
    rows = list(bench_prepare.measure(tmp_path, sizes, lambda *given, **options: (1e-6, 0, 0)))
    names = ("prepare / plain loop", "prepare, 1 processes, rows written", "private memory, 200 rows")
    assert set(names) <= set(failed(rows))


def test_bench_run_fails(tool, tmp_path):
    bench_run = tool("bench_run")

    def train_nothing(config, folder, overrides):
        return bench_run.Outcome(seconds=1e-3, steps=0, metrics=dict.fromkeys(bench_run.METRICS, 0.0))

    plain = SimpleNamespace(batch=2, samples=4, measure_seconds=lambda steps, overrides: 0.1)
    options = {"steps": 1, "nproc": 1, "overrides": [], "train": train_nothing}
    names = ["time", "steps", "student mean rank", "teacher mean rank"]
    assert failed(bench_run.measure(plain, ["x.yaml"], tmp_path, **options)) == [f"x: {name}" for name in names]
