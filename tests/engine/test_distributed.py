"""Where a process stands, told by devices that are not there: which device it takes, and whether ranks agree."""

import json
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore

from cosmos_ssl.engine import distributed, exchange
from cosmos_ssl.engine.distributed import agree_on_device, be_impatient, dump_flights, joined_world, pick_device
from cosmos_ssl.errors import TrainingError, UserError


@pytest.fixture
def cards(monkeypatch):
    """Have this machine show so many CUDA devices, to the rank of this number on it; the devices that were set."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"card {device.index}")
    )
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)

    def cards(count, local_rank=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        return chosen

    return cards


def test_a_rank_takes_the_device_of_its_number(cards, monkeypatch):
    for count, local_rank, index in ((4, 0, 0), (4, 3, 3), (1, 3, 0)):  # the last sees its own device alone
        chosen = cards(count, local_rank)
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", index) == chosen.pop()
        chosen.clear()
    assert [os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")].count(
        "expandable_segments:True"
    ) == 1
    cards(2, 2)
    with pytest.raises(UserError, match=r"^LOCAL_RANK is 2, and this machine has 2 CUDA devices, one a rank\."):
        pick_device("auto")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_user_s_own_allocator_stays(cards, monkeypatch, name):
    cards(1)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    pick_device("cuda")
    assert {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")} == {
        name: "max_split_size_mb:64"
    }


def other(**told):
    return {"node": "there", "type": "cuda", "id": "card 0", "fault": ""} | told


@pytest.mark.parametrize(
    ("count", "wanted", "theirs", "message"),
    [
        (
            0,
            "auto",
            other(),
            r"^training\.device: rank 0 \(here\) finds no CUDA device, and rank 1 \(there\) has one\.",
        ),
        (1, "auto", other(type="cpu", id=""), r"rank 1 \(there\) finds no CUDA device, and rank 0 \(here\) has one"),
        (0, "cuda", other(), r"^rank 0 \(here\): training\.device: cuda was asked for"),
        (1, "cuda", other(fault="training.device: x"), r"^rank 1 \(there\): training\.device: x$"),
        (1, "cuda", other(node="here"), r"^rank 0 \(here\) and rank 1 \(here\) would share one CUDA device\."),
        (1, "auto", other(), None),
        (2, "cuda", other(node="here", id="card 1"), None),
        (0, "auto", other(type="cpu", id=""), None),
    ],
)
def test_ranks_agree_on_the_device_before_they_meet(cards, count, wanted, theirs, message):
    cards(count)
    store = HashStore()
    store.set("device/1", json.dumps(theirs))
    if message is not None:
        with pytest.raises(UserError, match=message):
            agree_on_device(wanted, store, 0, 2)
    else:
        assert agree_on_device(wanted, store, 0, 2).type == theirs["type"]
    assert json.loads(store.get("device/0"))["node"] == "here"


def test_nccl_is_asked_for_and_its_recorder_switched_on(cards, monkeypatch, tmp_path):
    """Before the group is made; its record goes into the run folder, and what tells of a lost rank says so."""
    cards(1)
    store, made = HashStore(), []
    store.set("device/1", json.dumps(other()))
    store.set("left/1", "")
    recorder = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
    for name in recorder:
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda *args, **options: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(
        dist, "init_process_group", lambda name, **_: made.append((name, [os.environ[key] for key in recorder]))
    )
    assert dump_flights() == ""
    with joined_world("auto", tmp_path):
        pass
    assert made == [("cpu:gloo,cuda:nccl", ["2000", "1", f"{tmp_path}/nccl_rank"])]
    record = lambda: b"record"  # noqa: E731
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", record, raising=False)
    assert f"are in {tmp_path}/nccl_rank0 " in dump_flights()
    assert (tmp_path / "nccl_rank0").read_bytes() == b"record"


def test_patience_ends_with_the_first_step(monkeypatch):
    """Where there are several ranks; gloo keeps to it as NCCL does."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=distributed.STARTING)
    timeout = lambda: dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout  # noqa: E731
    try:
        be_impatient()
        assert timeout() == distributed.STARTING
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        be_impatient()
        assert timeout() == distributed.RUNNING == timedelta(minutes=15)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("parameter", [False, True])
def test_tensors_that_differ_between_ranks_are_told_apart(monkeypatch, parameter):
    """With their part: the other rank holds one more in the first number."""
    tensors = {"same": torch.ones(3), "student.x": nn.Parameter(torch.ones(2)) if parameter else torch.ones(2)}
    monkeypatch.setattr(exchange, "world_size", lambda: 2)
    monkeypatch.setattr(exchange, "all_max", lambda x: torch.maximum(x, x + torch.tensor([[0, 1], [0, -1]])))
    monkeypatch.setattr(exchange, "gather_objects", lambda value: [value, value + 1])
    told = r"ranks have come apart: student.x of rank 1 is not the first rank's \(tensors that differ: 1\)"
    with pytest.raises(TrainingError, match=rf"{told}\. losses\.x \(ann 1\) does not do") as raised:
        exchange.check_replicas(tensors, lambda name: "losses.x (ann 1)" if name == "student.x" else "another")
    assert ("register it with persistent=False" in str(raised.value)) is not parameter


def test_running_statistics_are_the_mean_over_ranks(monkeypatch):
    """Of batch norm, by whichever ranks' batches they moved: the other rank's are three times these."""
    monkeypatch.setattr(exchange, "world_size", lambda: 2)
    monkeypatch.setattr(exchange, "all_sum", lambda x: 4 * x)
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2))
    model[0](torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    before = norm.running_mean.clone(), norm.running_var.clone()
    exchange.RunningStatistics(model).share()
    assert torch.equal(norm.running_mean, 2 * before[0]) and torch.equal(norm.running_var, 2 * before[1])
