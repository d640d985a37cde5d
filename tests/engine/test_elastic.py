"""A whole COSMOS run stopped, killed and continued on other numbers of ranks and loader workers: the same inputs, the
same losses.

Also a program: python test_elastic.py STAGE_JSON trains one stage as so many forked ranks and prints their exit codes.
"""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import cosmos_ssl
from cosmos_ssl import build
from cosmos_ssl.config import load_config
from cosmos_ssl.engine.checkpoint import checkpoint_folders, load_tensors
from cosmos_ssl.engine.distributed import joined_world
from cosmos_ssl.errors import CosmosError

SHARDS = (5, 9, 3, 7, 4)
BATCH, LANES, EPOCHS = 8, 4, 5
EPOCH = sum(SHARDS) // BATCH  # steps
STEPS = EPOCH * EPOCHS

CONFIG = {
    "name": "elastic",
    "model": {
        "embed_dim": 16,
        "image": {"type": "clip_vit", "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32},
        "text": {"type": "clip_text", "width": 16, "layers": 1, "heads": 2},
    },
    "tokenizer": {"type": "clip", "context_length": 16},
    "augmenters": {
        "image": {"type": "multi_crop", "global_crops_size": 32, "local_crops_number": 2, "local_crops_size": 16},
        "text": {"type": "text_crop", "num_sampled_captions": 4, "max_sentences": 3},
    },
    "heads": {"cross": {"type": "cross_attention", "num_heads": 2}},
    "losses": {"clip": {"type": "clip"}, "distill": {"type": "cross_modality_distillation", "head": "cross"}},
    "teacher": {"type": "ema", "momentum_teacher": 0.9, "update_when": "before_optimizer_step"},
    "loader": {"lanes": LANES, "shuffle_samples": 4 * LANES},  # windows within the lanes: the set is not permuted whole
    # a bias of keys has no gradient but rounding errors, which a smaller eps would blow up to whole updates
    "optimizer": {"lr": 1e-3, "eps": 1e-3},
    "schedule": {"epochs": EPOCHS, "warmup_steps": 4},
    "training": {"batch_size": BATCH, "precision": "fp32", "device": "cpu", "seed": 7},
    "checkpoints": {"every_minutes": None, "keep_last": 100},
    "logging": {"every_steps": 1, "tensorboard": False},
}

# ranks, loader workers, first step, the step after the last one, how the stage ends
STAGES = [
    (4, 1, 0, 2, "stopped"),
    (1, 2, 2, 4, "stopped"),
    (2, 1, 4, 8, "killed"),  # nothing is saved, so what follows starts where this one did
    (4, 0, 4, 10, "stopped"),
    (1, 3, 10, 11, "stopped"),
    (2, 0, 11, STEPS, "finished"),
]


# ---------------------------------------------------------------------------- the program


def fingerprints(views):
    """What a batch holds, sample by sample: its key, and type, shape and hash of every tensor's part."""
    tensors = {
        f"{name}/{field}": getattr(group, field)
        for name, group in views.image.items()
        for field in ("pixels", "params")
    }
    tensors |= {
        f"{name}/{field}": getattr(group, field)
        for name, group in views.text.items()
        for field in ("tokens", "lengths")
    }

    def told(part):
        return f"{part.dtype} {list(part.shape)} {hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16]}"

    return [
        {"key": key, **{name: told(tensor[:, i]) for name, tensor in tensors.items()}}
        for i, key in enumerate(views.keys)
    ]


def watched(trainer, stage):
    """The batches as training takes them, each written down; at the stage's last one the run is told to stop, or
    dies.
    """
    rank, world, batches = trainer.world.rank, trainer.world.size, trainer.loader.batches
    path = Path(stage["record"]) / f"rank{rank}.jsonl"

    def batches_and_the_end(start_step, stop_step):
        for batch in batches(start_step, stop_step):
            positions = trainer.order.rank_positions(batch.step, rank, world).tolist()
            with path.open("a") as file:
                file.write(
                    json.dumps({"step": batch.step, "positions": positions, "samples": fingerprints(batch.views)})
                    + "\n"
                )
            if batch.step == stage["stop"] - 1:
                end(trainer, stage["end"])
            yield batch

    return batches_and_the_end


def end(trainer, how):
    """Stop or kill: a signal that one rank alone has seen before the step, or the death of all of them."""
    if how == "stopped" and trainer.world.rank == trainer.world.size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
        while trainer.signals.received is None:
            time.sleep(0.001)
    if how == "killed":
        with suppress(RuntimeError):  # the others may be dead already, but have done with the step before
            dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


def train(stage, rank):
    """One rank of a stage; its exit code."""
    os.environ["RANK"] = str(rank)
    try:
        with joined_world("cpu"):
            trainer = cosmos_ssl.make_trainer(stage["config"])
            trainer.loader.batches = watched(trainer, stage)
            trainer.train()
    except CosmosError as error:
        print(error, flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def train_ranks(stage):
    """All ranks of a stage, forked once everything is imported; their exit codes, negative for a signal."""
    torch.set_num_threads(1)
    build.check(load_config(stage["config"]))
    torch.optim.AdamW([torch.zeros(1)])  # the first one imports torch's compiler, for seconds
    ranks = []
    for rank in range(int(os.environ["WORLD_SIZE"])):
        process = os.fork()
        if not process:
            os._exit(train(stage, rank))
        ranks.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]


# ---------------------------------------------------------------------------- the test


def sample(number):
    """Members of a sample: a picture of noise, sentences. One of them cannot be decoded."""
    rng = np.random.default_rng(number)
    picture = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)).resize((60, 48))
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg")
    sentences = [
        f"sentence {n} of picture {number} says {' '.join(rng.choice(['red', 'blue', 'round', 'far'], 3))}"
        for n in range(6)
    ]
    table = {"raw_caption": sentences[:1], "longIB_captions": sentences[1:]}
    return {"jpg": b"no picture" if number == 11 else buffer.getvalue(), "json": json.dumps(table).encode()}


@pytest.fixture
def shards(tmp_path):
    """The shards' pattern; a sample's key begins with its shard's number."""
    number = 0
    for shard, size in enumerate(SHARDS):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for _ in range(size):
                for extension, body in sample(number).items():
                    info = tarfile.TarInfo(f"{shard}-{number}.{extension}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
                number += 1
    return f"{tmp_path}/{{0..{len(SHARDS) - 1}}}.tar"


@pytest.fixture
def start_stage(shards, tmp_path):
    """Start a stage of the run in ``tmp_path / name`` as a process, into whose folder ``record`` its ranks write."""
    started, stores = [], []

    def start(name, world, workers, stop, end):
        record = tmp_path / f"{name}.{len(started)}"
        record.mkdir()
        data = {"type": "webdataset", "train_data": shards}
        config = {
            **CONFIG,
            "output_dir": str(tmp_path / name),
            "data": data,
            "loader": {**CONFIG["loader"], "workers": workers},
        }
        stage = {"config": config, "record": str(record), "stop": stop, "end": end}
        stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[-1].port)}
        environment = os.environ | place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, json.dumps(stage)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        process.record = record
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def outcome(process):
    """Exit codes of the ranks, what was said, and the batches that were consumed: {step: the samples in the order of
    positions}.
    """
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    found = {}
    for rank in range(len(list(process.record.iterdir()))):
        for line in (process.record / f"rank{rank}.jsonl").read_text().splitlines():
            row = json.loads(line)
            positions, samples = found.setdefault(row["step"], ([], []))
            positions += row["positions"]
            samples += row["samples"]
    for step, (positions, _) in found.items():
        first = step % EPOCH * BATCH
        assert positions == list(range(first, first + BATCH)), f"step {step}"
    return json.loads(said.splitlines()[-1]), said, {step: samples for step, (_, samples) in found.items()}


@pytest.mark.slow
def test_other_ranks_and_workers_take_the_same_inputs_and_come_to_the_same_losses(start_stage, rows, tmp_path):
    """Over ends of epochs, with a bad sample, and again where a killed run had been; pictures, parameters and tokens to
    the last bit.
    """
    whole = start_stage("whole", 1, 0, STEPS, "finished")
    taken, logged = [], []
    for world, workers, start, stop, how in STAGES:
        codes, said, found = outcome(start_stage("cut", world, workers, stop, how))
        assert codes == [{"stopped": 75, "killed": -signal.SIGKILL, "finished": 0}[how]] * world, said
        assert list(found) == list(range(start, stop)), said
        taken.append(found)
        logged.append(rows(tmp_path / "cut"))
        assert [row["step"] for row in logged[-1]] == list(range(1, stop + (how != "killed"))), said
    codes, said, inputs = outcome(whole)
    assert codes == [0] and list(inputs) == list(range(STEPS)), said

    for found in taken:
        for step, samples in found.items():
            assert samples == inputs[step], f"step {step}"
    check_inputs(inputs)
    expected = rows(tmp_path / "whole")
    assert expected[-1]["bad_samples"] > 0
    for found in logged:
        for row, same in zip(found, expected, strict=False):
            assert row == pytest.approx(same, rel=1e-5), f"step {row['step']}"

    last, same = (checkpoint_folders(tmp_path / name)[-1] for name in ("cut", "whole"))
    assert last.name == same.name == f"step_{STEPS:08d}"
    for role in ("student", "teacher", "optimizer"):
        torch.testing.assert_close(load_tensors(last, role), load_tensors(same, role), rtol=1e-5, atol=1e-6)


def check_inputs(inputs):
    """That the inputs are such as could differ: raw pixels, other crops each time, lanes that cross shards."""
    first = inputs[0][0]
    assert {name for name in first if name.endswith("pixels")} == {"global/pixels", "local/pixels"}
    assert first["global/pixels"].startswith("torch.uint8 [2, 3, 32, 32]")
    for name in first.keys() - {"key"}:
        if not name.endswith("lengths"):
            told = [one[name] for samples in inputs.values() for one in samples]
            assert len(set(told)) > 0.9 * len(told), name
    for epoch in range(EPOCHS):
        steps = [inputs[epoch * EPOCH + step] for step in range(EPOCH)]
        lanes = np.array([[one["key"].split("-")[0] for one in samples] for samples in steps]).reshape(EPOCH, LANES, -1)
        assert max(len(np.unique(lanes[:, lane])) for lane in range(LANES)) > 1, epoch


if __name__ == "__main__":
    print(json.dumps(train_ranks(json.loads(sys.argv[1]))))
