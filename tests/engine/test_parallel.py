"""Ranks that share one copy of the weights: exact resume, other kinds and numbers of ranks, faults, what is refused."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import cosmos_ssl
from cosmos_ssl.engine.checkpoint import checkpoint_folders, find_fault, load_tensors
from cosmos_ssl.engine.exchange import check_replicas
from cosmos_ssl.engine.memory import owners
from cosmos_ssl.engine.signals import Interrupted
from cosmos_ssl.errors import TrainingError
from cosmos_ssl.functional import is_sharded, local

FSDP = {"parallel": "fsdp"}
HSDP = {"parallel": "hsdp", "parallel_shards": 2}


def tensors(run_dir):
    """The newest checkpoint: its name, and all its tensors."""
    folder = checkpoint_folders(run_dir)[-1]
    assert find_fault(folder) is None
    return folder.name, {
        f"{role}.{name}": x
        for role in ("student", "teacher", "optimizer")
        for name, x in load_tensors(folder, role).items()
    }


@pytest.mark.parametrize(("world", "kind"), [(2, FSDP), pytest.param(4, HSDP, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_never_killed(ranks, finished, rows, tmp_path, world, kind):
    """To the last bit; one rank draws other weights at its start: all take the first one's. A step is skipped, as its
    loss is not finite on one rank. Checkpoints lie in several files, which the ranks write.
    """
    options = {"training": kind | {"clip_grad_norm": 0.5}, "checkpoints": {"every_steps": 2, "shards": 3}}
    poison, start = {"poison": {2: "loss"}}, {"start": {0: "drift"}}
    last = str(world - 1)
    codes, said = finished(ranks(tmp_path / "whole", world, befalls={last: poison}, **options))
    assert codes == [0] * world, said
    fatal = {last: {"loss": {7: "die"}, **poison, **start}}
    codes, said = finished(ranks(tmp_path / "cut", world, befalls=fatal, **options))
    assert codes[-1] == -signal.SIGKILL and set(codes[:-1]) == {74}, said
    codes, said = finished(ranks(tmp_path / "cut", world, befalls={last: poison}, **options))
    assert codes == [0] * world, said
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [row["skipped_steps"] for row in rows(tmp_path / "whole") if "loss" in row][-1] == 1
    (name, found), (same, expected) = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert name == same and all(torch.equal(found[key], expected[key]) for key in expected)
    files = {path.name for path in checkpoint_folders(tmp_path / "cut")[-1].glob("teacher*")}
    assert files == {f"teacher-0000{n}-of-00003.safetensors" for n in (1, 2, 3)} | {"teacher.safetensors.index.json"}


def test_a_rank_that_fails_alone_between_steps_does_not_save(ranks, finished, rows, tmp_path):
    """The others may be gone, and saving takes all: the run goes on from the checkpoint before."""
    options = {"training": FSDP, "checkpoints": {"every_steps": 2}, "loader": {"workers": 0}}
    codes, said = finished(ranks(tmp_path / "cut", 2, befalls={"0": {"crop": {7: "raise"}}}, **options))
    assert codes == [1, 74] and "step  3 of 10" in said[0] and "no crop any more" in said[0], said
    assert tensors(tmp_path / "cut")[0] == "step_00000002"
    for run in ("cut", "whole"):
        codes, said = finished(ranks(tmp_path / run, 2, **options))
        assert codes == [0, 0], said
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_an_optimiser_of_whole_matrices_is_refused(ranks, finished, tmp_path):
    codes, said = finished(ranks(tmp_path, 2, training=FSDP, optimizer={"type": "timm", "name": "lamb"}))
    assert codes == [2, 2] and "optimizer: Lamb moves a weight by what others" in said[0], said


@pytest.mark.slow
def test_a_signal_within_an_evaluation_finds_the_run_saved(ranks, finished, rows, tmp_path):
    """Ranks call the model unequally often there. The evaluation comes again, and all goes on as if nothing was."""
    options = {"training": FSDP, "schedule": {"epochs": 1}, "checkpoints": {"every_steps": 100}}
    processes = ranks(tmp_path, 2, evaluation_seconds=60.0, **options)
    for process in processes:
        process.wait_for("evaluates")
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes, said = finished(processes)
    assert codes == [75, 75] and "saved" in said[0], said
    assert tensors(tmp_path)[0] == "step_00000005"
    codes, said = finished(ranks(tmp_path, 2, **options))
    assert codes == [0, 0], said
    assert {"mean/student/mean", "mean/teacher/mean"} <= {name for row in rows(tmp_path) for name in row}


# ---------------------------------------------------------------------------- other kinds and numbers of ranks

CONFIG = {
    "name": "elastic",
    "model": {
        "embed_dim": 16,
        "image": {"type": "clip_vit", "width": 32, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32},
        "text": {"type": "clip_text", "width": 16, "layers": 2, "heads": 2, "grad_checkpointing": "alternate"},
    },
    "tokenizer": {"type": "clip", "context_length": 16},
    "augmenters": {
        "image": {"type": "multi_crop", "global_crops_size": 32, "local_crops_number": 2, "local_crops_size": 16},
        "text": {"type": "text_crop", "num_sampled_captions": 4, "max_sentences": 3},
    },
    "heads": {"cross": {"type": "cross_attention", "num_heads": 2}},
    "losses": {"clip": {"type": "clip"}, "distill": {"type": "cross_modality_distillation", "head": "cross"}},
    "teacher": {"type": "ema", "momentum_teacher": 0.9},
    "callbacks": {"average": {"type": "weight_average", "decay": 0.5}},
    "loader": {"workers": 0, "lanes": 4},
    "optimizer": {"lr": 0.001, "eps": 1e-3},  # keys' biases have no gradient but rounding, which is not to be scaled up
    "schedule": {"epochs": 3, "warmup_steps": 2},
    "logging": {"every_steps": 1, "tensorboard": False},
}
TRAINING = {"batch_size": 8, "precision": "fp32", "device": "cpu", "clip_grad_norm": 0.1, "clip_grad_per": "module"}
# ranks, what is new of ``training``, the step after the last one
STAGES = [(2, {}, 2), (2, FSDP | {"micro_batch_size": 2}, 4), (4, HSDP, 6), (1, FSDP, None)]


def stage(rank, world, store, folder, data, training, stop, results):
    """Train until ``stop``, when a signal reaches the last rank alone; what the rank holds, and whether copies that
    differ are found.
    """
    torch.set_num_threads(1)
    os.environ.pop("WORLD_SIZE", None)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    files = {"shards": 3 if "parallel" in training else 1}
    config = {**CONFIG, "output_dir": folder, "data": data, "training": TRAINING | training, "checkpoints": files}
    trainer = cosmos_ssl.make_trainer(config)
    batches = trainer.loader.batches

    def until_told(start, end):
        for batch in batches(start, end):
            if batch.step + 1 == stop and rank == world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                while trainer.signals.received is None:
                    time.sleep(0.001)
            yield batch

    trainer.loader.batches = until_told
    try:
        trainer.train()
    except Interrupted:
        assert stop is not None
    state = trainer.run.state
    results[rank] = owners(state), apart(state, rank) if training.get("parallel") == "hsdp" else None
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def apart(state, rank):
    """What is said where one rank's part of a weight is not that of the other copy."""
    check_replicas(state.replicas, state.owner)
    name, weight = next((name, x) for name, x in state.replicas.items() if is_sharded(x))
    local(weight).add_(rank == 3)
    try:
        check_replicas(state.replicas, state.owner)
    except TrainingError as error:
        return name in str(error)
    return False


@pytest.mark.slow
def test_a_run_goes_on_in_any_kind_on_any_number_of_ranks(in_ranks, rows, tmp_path):
    """Losses, weights, teacher, optimiser and an average of weights as of one rank; shards take less memory; a copy
    that has come apart is found.
    """
    data = {"type": "scenes", "folder": str(tmp_path / "scenes"), "image_size": 48}
    data |= {"train_samples": 24, "validation_samples": 8, "caption_schema": "dreamlip"}
    one = {}
    stage(0, 1, "", str(tmp_path / "whole"), data, {}, None, one)
    found = []
    for world, training, stop in STAGES:
        given = (str(tmp_path / "cut"), data, training, stop)
        found.append({})
        if world > 1:
            found[-1] = in_ranks(stage, world, *given)
        else:
            stage(0, 1, "", *given, found[-1])
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, 10))
    for row, same in zip(rows(tmp_path / "cut"), rows(tmp_path / "whole"), strict=True):
        assert row == pytest.approx(same, rel=1e-5), f"step {row['step']}"
    (name, last), (same, expected) = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert name == same
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-6)
    averages = (load_tensors(checkpoint_folders(tmp_path / run)[-1], "average") for run in ("cut", "whole"))
    torch.testing.assert_close(*averages, rtol=1e-4, atol=1e-6)
    _, fsdp, hsdp, _ = found
    for rank in fsdp:
        for what in ("parameters", "optimiser state", "teacher"):
            assert fsdp[rank][0][what] < 0.7 * one[0][0][what], what
    assert [told for _, told in hsdp.values()] == [True] * 4
