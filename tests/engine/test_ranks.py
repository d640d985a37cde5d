"""Several ranks as real processes: resuming to the same bits, signals, faults of one rank."""

import signal
import threading
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from cosmos_ssl.engine import distributed, evaluation_signals
from cosmos_ssl.engine.checkpoint import checkpoint_folders, load_tensors
from cosmos_ssl.engine.distributed import World, joined_world
from cosmos_ssl.engine.evaluation_signals import EvaluationSignals
from cosmos_ssl.engine.exchange import GradientMean
from cosmos_ssl.engine.metrics import read_rows
from cosmos_ssl.engine.signals import Interrupted, Signals
from cosmos_ssl.errors import StorageError, UserError
from cosmos_ssl_launch import main

LONG = {"schedule": {"epochs": 100_000, "warmup_steps": 2}, "checkpoints": {"every_steps": None, "every_minutes": 30}}


def weights(run_dir):
    folder = checkpoint_folders(run_dir)[-1]
    return folder.name, load_tensors(folder, "student") | {
        f"{role}.{n}": t
        for role in ("teacher", "shake")
        if (folder / f"{role}.safetensors").exists()
        for n, t in load_tensors(folder, role).items()
    }


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_never_killed(ranks, finished, rows, tmp_path, world):
    """To the last bit: rows, weights, and a callback that draws; the bad sample of one rank is counted on all.

    One rank draws other weights at its start: all take the first one's.
    """
    options = {"bad": [3], "shake": True, "optimizer": {"type": "timm", "name": "lamb"}}  # of AdamW, test_elastic.py
    codes, said = finished(ranks(tmp_path / "whole", world, **options))
    assert codes == [0] * world, said
    fatal = {str(world - 1): {"loss": {7: "die"}, "start": {0: "drift"}}}
    codes, said = finished(ranks(tmp_path / "cut", world, befalls=fatal, **options))
    assert codes[-1] == -signal.SIGKILL
    assert set(codes[:-1]) == {74}, said
    assert "another rank was lost" in said[0]
    codes, said = finished(ranks(tmp_path / "cut", world, **options))
    assert codes == [0] * world, said
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    (name, found), (same, expected) = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert name == same
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [row["bad_samples"] for row in rows(tmp_path / "whole") if "loss" in row][-1] == 2


def test_a_signal_to_one_rank_ends_all_at_one_step(ranks, finished, wait_for_step, tmp_path):
    processes = ranks(tmp_path, 2, **LONG)
    wait_for_step(tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finished(processes)
    assert codes == [75, 75], said
    step = checkpoint_folders(tmp_path)[-1].name[5:].lstrip("0")
    assert f"at step {int(step):,} " in said[0] and f"at step {int(step):,} " in said[1]


@pytest.mark.parametrize("seconds", [(0, 500), (500, 0), (500, 500)])
def test_a_signal_to_one_rank_stops_an_evaluation_on_all(ranks, finished, tmp_path, seconds):
    """Also if the other ranks have ended theirs."""
    own = {rank: {"evaluation_seconds": seconds[rank]} for rank in (0, 1)}
    processes = ranks(tmp_path, 2, own, **LONG)
    slow = processes[seconds.index(500)]
    slow.wait_for("evaluates")
    slow.send_signal(signal.SIGTERM)
    codes, said = finished(processes)
    assert codes == [75, 75], said
    assert "at step 5 " in said[0] and "at step 5 " in said[1]
    assert checkpoint_folders(tmp_path)[-1].name == "step_00000005"


def wait_in_collective(rank, world, store, results):
    """As an evaluation of one rank that waits for the other, which a signal has reached."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    evaluation_signals.STOPPING = timedelta(seconds=0.5)
    signals = Signals()
    signals.received = None if rank == 0 else signal.SIGTERM
    watched = EvaluationSignals(signals, World())
    with pytest.raises(Interrupted) as caught:
        watched.run(lambda: dist.barrier() if rank == 0 else watched.check())
    results[rank] = caught.value.number, caught.value.together


def test_a_signal_reaches_a_rank_that_waits_in_a_collective_of_an_evaluation(in_ranks):
    assert in_ranks(wait_in_collective, 2) == dict.fromkeys((0, 1), (signal.SIGTERM, False))


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(ranks, finished, rows, tmp_path):
    codes, said = finished(ranks(tmp_path, 2, befalls={1: {"poison": {2: "loss"}}}))
    assert codes == [0, 0], said
    assert [row["skipped_steps"] for row in rows(tmp_path) if "loss" in row][-1] == 1
    assert "step 3: " in (tmp_path / "log.rank1.txt").read_text()


@pytest.mark.parametrize("place", ["crop", "loss"])
def test_the_slowest_rank_is_found(ranks, finished, tmp_path, place):
    codes, said = finished(
        ranks(tmp_path, 2, schedule={"max_steps": 4}, befalls={1: {place: dict.fromkeys(range(8), "slow")}})
    )
    assert codes == [0, 0], said
    for row in [row for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row][1:]:
        assert row["slowest_rank"] == 1 and row["slowest_rank_lag"] > 0.2
    assert "  slowest rank 1 (+" in said[0]


def test_a_folder_in_use_is_refused_on_every_rank(tiny, ranks, finished, tmp_path):
    trainer = tiny.make_trainer(tmp_path)
    with trainer.folder.locked():
        codes, said = finished(ranks(tmp_path, 2))
    assert codes == [2, 2], said
    assert "in use by a live run" in said[0]


def test_buckets_hold_every_parameter_once_and_one_type_each(monkeypatch):
    monkeypatch.setattr("cosmos_ssl.engine.exchange.BUCKET", 100)
    sizes = [(30, torch.float32), (2, torch.float32), (3, torch.float64)]
    parameters = [torch.zeros(size, dtype=dtype, requires_grad=True) for size, dtype in sizes]
    buckets = GradientMean(parameters).buckets
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3], [2, 30]]


@pytest.fixture
def alone():
    """A process group of one rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.usefixtures("alone")
def test_means_begin_where_kernels_read_wide(monkeypatch, aligned):
    """On the host, which stands for a device here, they lie close: the order of gloo's sums goes by the place."""
    monkeypatch.setattr("cosmos_ssl.engine.exchange.ALIGNMENT", {"cpu" if aligned else "cuda": 16})
    sizes = [(3, 3), (), (5,), (4, 2), ()]
    parameters = [torch.randn(size, requires_grad=True) for size in sizes]
    mean = GradientMean(parameters)
    sum((x * x).sum() for x in parameters).backward()
    mean.finish()
    assert all(torch.equal(x.grad, 2 * x) for x in parameters)
    places = [4 * x.grad.storage_offset() for x in reversed(parameters)]
    assert places == ([0, 16, 48, 80, 96] if aligned else [0, 4, 36, 56, 60])


def test_cosmos_launch_on_two_ranks_trains_and_evaluates_as_on_one(rows, tmp_path, monkeypatch, capfd):
    """The quickstart's parts, shortened: losses to float32's last digits, the same ranks in retrieval; and a number
    that cannot be.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    short = [
        "data.train_samples=64",
        "data.validation_samples=18",
        "training.batch_size=16",
        "schedule.max_steps=2",
        "logging.every_steps=1",
    ]
    small = ["model.image.layers=1", "model.text.layers=1", f"data.folder={tmp_path}/scenes"]
    command = ["--config", "quickstart.yaml", *short, *small]
    found = []
    for nproc in (1, 2):
        code = main([*command, f"output_dir={tmp_path}/{nproc}", f"profile.nproc={nproc}"])
        said = capfd.readouterr()
        assert code == 0, said
        found.append({name: value for row in rows(tmp_path / str(nproc)) for name, value in row.items()})
    assert "training here, in 2 processes" in said.out
    assert found[0].keys() == found[1].keys()
    for name in ("loss", "loss/clip", "loss/distill"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)
    for name in (
        "retrieval/student/image_to_text_mean_rank",
        "retrieval/teacher/text_to_image_R@5",
        "classification/student/top5",
    ):
        assert found[0][name] == pytest.approx(found[1][name])
    assert main([*command, f"output_dir={tmp_path}/3", "profile.nproc=3"]) == 2
    assert "Possible: 1, 2, 4, 8, 16" in capfd.readouterr().err


def test_no_rank_leaves_while_another_may_still_hear_from_it(monkeypatch):
    """A broadcast fails on the rank that gives where the one that receives has already gone: the wait is by way of the
    store. Without the others a rank breaks off what is under way, and goes also where that never ends.
    """
    store, left = HashStore(), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cosmos_ssl.engine.distributed.rendezvous", lambda *args, **options: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(store.check(["left/1"])))
    monkeypatch.setattr(distributed, "_abort_process_group", lambda: left.append("abort") or threading.Event().wait())
    monkeypatch.setattr(distributed, "ABORTING", 0.05)
    monkeypatch.setattr(distributed, "LEAVING", timedelta(seconds=1))
    for ended, together, comes in (
        (None, True, 0.2),
        (Interrupted(signal.SIGTERM), True, 0.2),
        (StorageError("another rank was lost"), "abort", 0.2),
        (UserError("a part failed"), "abort", 1.2),
        (KeyError("unforeseen"), "abort", 0.2),
    ):
        store.delete_key("left/1")
        other = threading.Timer(comes, store.set, ["left/1", ""])
        other.start()
        with nullcontext() if ended is None else pytest.raises(type(ended)), joined_world("cpu"):
            if ended is not None:
                raise ended
        other.join()
        assert left.pop() == together
