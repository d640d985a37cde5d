"""The trainer in one process: resuming, skipping, order of teacher and optimiser, evaluation, the end."""

import io
import logging
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from cosmos_ssl.engine import trainer as trainer_module
from cosmos_ssl.engine.checkpoint import (
    Snapshot,
    checkpoint_folders,
    latest_checkpoint,
    load_tensors,
    read_state,
    save_checkpoint,
    to_host,
)
from cosmos_ssl.engine.metrics import read_rows
from cosmos_ssl.errors import CheckpointError, StorageError, TrainingError, UserError
from cosmos_ssl.models import precision


def weights(run_dir):
    newest = checkpoint_folders(run_dir)[-1]
    return {
        f"{role}.{name}": value
        for role in ("student", "teacher", "optimizer")
        for name, value in load_tensors(newest, role).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stop(Exception):
    """What a test throws into a run."""


class Halt:
    """A writer that ends the run once ``step`` is logged, as a crash would: nothing is saved after it."""

    def __init__(self, trainer_of, step):
        self.trainer_of, self.step = trainer_of, step

    def scalars(self, step, values):
        if step == self.step:
            self.trainer_of().run.between_steps = False
            raise Stop

    def pictures(self, step, pictures):
        pass

    sync = close = lambda self: None


def crash(tiny, run_dir, at, config=None, **options):
    """Train until step ``at`` is logged, then fail."""
    halt = Halt(lambda: trainer, at)
    trainer = tiny.make_trainer(run_dir, config, writers=[halt], **options)
    with pytest.raises(Stop):
        trainer.train()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_crashed_and_resumed_equals_never_crashed(tiny, rows, tmp_path, before):
    evaluators = lambda: {"mean": tiny.Mean()}  # noqa: E731
    tiny.make_trainer(tmp_path / "whole", evaluators=evaluators(), before=before).train()
    for at in (2, 5, 8):  # before any checkpoint; at an epoch's end, evaluation done or not; between two checkpoints
        crash(tiny, tmp_path / "cut", at, evaluators=evaluators(), before=before)
    tiny.make_trainer(tmp_path / "cut", evaluators=evaluators(), before=before).train()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_teacher_has_no_losses_and_those_of_an_older_checkpoint_are_left_out(tiny, rows, tmp_path):
    tiny.make_trainer(tmp_path / "whole").train()
    crash(tiny, tmp_path / "cut", 8)
    path = latest_checkpoint(tmp_path / "cut")
    student, teacher, optimizer = (load_tensors(path, name) for name in ("student", "teacher", "optimizer"))
    own = {name: x + 1 for name, x in student.items() if name.startswith("losses.")}
    assert len(own) == 2 and not own.keys() & teacher.keys()
    tensors = {"student": to_host(student), "teacher": to_host(own | teacher), "optimizer": to_host(optimizer)}
    state = read_state(path)
    save_checkpoint(tmp_path / "cut", Snapshot(step=state["step"], tensors=tensors, state=state))
    trainer = tiny.make_trainer(tmp_path / "cut")
    trainer.train()
    assert not any(name.startswith("losses.") for name, _ in trainer.assembly.teacher.model.named_parameters())
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_workers_change_nothing(tiny, rows, tmp_path):
    tiny.make_trainer(tmp_path / "none").train()
    tiny.make_trainer(tmp_path / "two", tiny.make_config(loader={"workers": 2})).train()
    assert rows(tmp_path / "none") == rows(tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("amp_bf16", {}),
        ("amp_fp16", {}),
        ("amp_fp16", {"type": "timm", "name": "lion"}),
        ("amp_bf16", {"type": "torch", "name": "NAdam"}),
        ("fp32", {"type": "timm", "name": "muon", "weight_decay": {"type": "linear", "start": 0.1, "end": 0.0}}),
    ],
)
def test_half_precision_and_any_optimizer_resume_exactly(tiny, rows, tmp_path, name, optimizer):
    config = tiny.make_config(training={"precision": name, "batch_size": 4, "device": "cpu"}, optimizer=optimizer)
    tiny.make_trainer(tmp_path / "whole", config).train()
    crash(tiny, tmp_path / "cut", 8, config)
    tiny.make_trainer(tmp_path / "cut", config).train()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert ("loss_scale" in rows(tmp_path / "cut")[0]) == (name == "amp_fp16")


def told(tiny, folder, name):
    """What the console shows of a run in this precision on the CPU."""
    said = io.StringIO()
    config = tiny.make_config(training={"precision": name, "batch_size": 4, "device": "cpu"})
    tiny.make_trainer(folder, config, Console(file=said, width=300)).train()
    return said.getvalue()


def test_auto_is_said_and_goes_on_in_what_a_run_was_begun_in(tiny, rows, tmp_path, monkeypatch):
    assert "batch 4, fp32 on cpu\nprecision: fp32 (auto on cpu)\n" in told(tiny, tmp_path / "auto", "auto")
    config = tiny.make_config(training={"precision": "amp_bf16", "batch_size": 4, "device": "cpu"})
    tiny.make_trainer(tmp_path / "whole", config).train()
    crash(tiny, tmp_path / "cut", 8, config)
    assert "precision: amp_bf16 (auto on cpu)" in told(tiny, tmp_path / "cut", "auto")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    with pytest.raises(UserError, match=r"training\.precision: 'amp_bf16' -> 'fp32'"):
        told(tiny, tmp_path / "cut", "fp32")
    with monkeypatch.context() as elsewhere:  # a device on which auto is another precision
        elsewhere.setattr(trainer_module, "resolve_precision", lambda name, device: "amp_bf16")
        crash(
            tiny,
            tmp_path / "moved",
            8,
            tiny.make_config(training={"precision": "auto", "batch_size": 4, "device": "cpu"}),
        )
    assert "precision: fp32 (auto on cpu); until here it was amp_bf16" in told(tiny, tmp_path / "moved", "auto")


def test_attention_is_settled_before_the_first_step(tiny, tmp_path, monkeypatch):
    """In the run's own precision and for its own heads; what was chosen stands among the first lines."""
    asked = []
    monkeypatch.setattr(trainer_module, "head_widths", lambda model: [32, 64])
    monkeypatch.setattr(trainer_module, "explain_backend", lambda *told: asked.append(told) or "sdpa (auto; no kernel)")
    said = told(tiny, tmp_path, "amp_bf16")
    assert asked == [("auto", torch.device("cpu"), torch.bfloat16, width) for width in (32, 64)]
    assert said.index("attention: sdpa (auto; no kernel)\n") < said.index("loss")
    assert "kernels: plain (auto on cpu)\n" in said


def test_a_precision_without_a_fast_path_is_named_at_the_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_seconds", lambda dtype: 1.0 if dtype == torch.float32 else 9.0)
    warning = (
        "warning: training.precision: this cpu has no fast path for amp_fp16, and a step may take many "
        "times as long. Faster here: "
    )
    assert warning + "training.precision=fp32\n" in told(tiny, tmp_path / "slow", "amp_fp16")
    assert "warning" not in told(tiny, tmp_path / "fast", "fp32")


def test_without_a_teacher(tiny, tmp_path):
    metrics = tiny.make_trainer(tmp_path, teacher=False, evaluators={"mean": tiny.Mean()}).train()
    assert "mean/student/mean" in metrics and not any("teacher" in name for name in metrics)
    assert not (checkpoint_folders(tmp_path)[-1] / "teacher.safetensors").exists()


def test_the_teacher_moves_when_it_was_asked_to(tiny, tmp_path):
    def first_step(before):
        folder = tmp_path / str(before)
        config = tiny.make_config(schedule={"max_steps": 1, "epochs": 2, "warmup_steps": 0})
        trainer = tiny.make_trainer(folder, config, before=before)
        start = {name: value.clone() for name, value in trainer.assembly.model.state_dict().items()}
        trainer.train()
        return (
            start,
            load_tensors(checkpoint_folders(folder)[-1], "student"),
            load_tensors(checkpoint_folders(folder)[-1], "teacher"),
        )

    start, _, teacher = first_step(before=True)
    assert torch.equal(teacher["image.stem.weight"], start["image.stem.weight"])
    start, student, teacher = first_step(before=False)
    torch.testing.assert_close(
        teacher["image.stem.weight"], 0.9 * start["image.stem.weight"] + 0.1 * student["image.stem.weight"]
    )


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(tiny, rows, tmp_path, monkeypatch, fault):
    """A run whose third step is poisoned has, after it, the weights and buffers of a run that ended before it."""
    short = tiny.make_config(schedule={"max_steps": 2, "epochs": 9, "warmup_steps": 100})
    longer = tiny.make_config(schedule={"max_steps": 3, "epochs": 9, "warmup_steps": 100})
    tiny.make_trainer(tmp_path / "short", short).train()
    monkeypatch.setattr(tiny.Match, "poison", {2: fault})
    tiny.make_trainer(tmp_path / "longer", longer).train()
    assert same(weights(tmp_path / "short"), weights(tmp_path / "longer"))
    assert weights(tmp_path / "longer")["student.losses.match.calls"] == 2
    last = rows(tmp_path / "longer")[-1]
    assert (last["step"], last["skipped_steps"]) == (3, 1)
    assert (last["loss"] is None) == (fault == "loss")
    said = (tmp_path / "longer/log.txt").read_text()
    what = "losses.match" if fault == "loss" else "the gradient"
    assert f"step 3: {what} is not finite, so the update is skipped (samples s" in said


def test_too_many_such_steps_in_a_row_stop_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.Match, "poison", {1: "loss", 3: "loss", 4: "loss", 5: "loss"})
    config = tiny.make_config(
        training={"batch_size": 4, "precision": "fp32", "device": "cpu", "max_nonfinite_steps": 3}
    )
    with pytest.raises(
        TrainingError,
        match=r"step 6: losses\.match is not finite, 3 steps in a row .* Samples of this step: s\d+, s\d+, s\d+, "
        r"s\d+\.",
    ):
        tiny.make_trainer(tmp_path, config).train()


def test_an_overflow_of_fp16_is_no_fault(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.Match, "poison", dict.fromkeys(range(5), "gradient"))
    training = {"batch_size": 4, "precision": "amp_fp16", "device": "cpu", "max_nonfinite_steps": 1}
    tiny.make_trainer(tmp_path, tiny.make_config(training=training)).train()
    counters = read_state(checkpoint_folders(tmp_path)[-1])["counters"]
    assert counters["overflowed_steps"] >= 5 and counters["nonfinite_steps"] == 0
    scales = [row["loss_scale"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert scales[4] == scales[0] / 2**4


def test_a_finished_run_says_so_and_is_left_alone(tiny, tmp_path):
    evaluator = tiny.Mean()
    first = tiny.make_trainer(tmp_path, evaluators={"mean": evaluator}).train()
    calls, said = evaluator.calls, io.StringIO()
    again = tiny.make_trainer(tmp_path, console=Console(file=said, width=200), evaluators={"mean": evaluator}).train()
    assert again == first and evaluator.calls == calls
    assert said.getvalue() == f"run {tmp_path} is finished (step 10)\n"


def test_a_finished_run_is_not_finished_for_another_one(tiny, tmp_path, monkeypatch):
    """Options with a slash are options; data that have changed were not trained on.

    What tells whose the folder is stays as it was.
    """

    def of(parts, **loader):
        return tiny.make_trainer(
            tmp_path, tiny.make_config(data={"type": "numbers", "parts": parts}, loader={"workers": 0, **loader})
        )

    of(["x/y.tar", "b"]).train()
    kept = {name: (tmp_path / name).read_text() for name in ("config.yaml", "identity.json")}
    with pytest.raises(UserError, match=re.escape('another config (data.parts: ["x/y.tar", "b"] -> ["x/y.tar", "c"])')):
        of(["x/y.tar", "c"]).train()
    monkeypatch.setattr(tiny, "SAMPLES", 21)  # as many steps
    with pytest.raises(UserError, match="another data set"):
        of(["x/y.tar", "b"]).train()
    with pytest.raises(UserError, match="is finished, with other data"):
        of(["x/y.tar", "b"], changed_data="accept").train()
    assert kept == {name: (tmp_path / name).read_text() for name in kept}


def test_more_shards_are_accepted_from_the_same_step_on(tiny, rows, tmp_path, monkeypatch):
    crash(tiny, tmp_path, 5)
    monkeypatch.setattr(tiny, "SAMPLES", 32)
    trainer = tiny.make_trainer(tmp_path, tiny.make_config(loader={"changed_data": "accept"}))
    trainer.train()
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 17))
    assert "(data, samples: 20 -> 32" in (tmp_path / "log.txt").read_text()


def test_a_folder_of_another_config_is_refused(tiny, tmp_path):
    tiny.make_trainer(tmp_path).train()
    with pytest.raises(UserError, match=r"belongs to another config \(optimizer.lr: 0.05 -> 0.1\)"):
        tiny.make_trainer(tmp_path, tiny.make_config(optimizer={"lr": 0.1})).train()


def test_a_damaged_checkpoint_is_passed_over(tiny, rows, tmp_path):
    tiny.make_trainer(tmp_path / "whole").train()
    config = tiny.make_config(checkpoints={"every_steps": None, "keep_every_epochs": 1})
    crash(tiny, tmp_path / "cut", 8, config)
    sound = tmp_path / "cut/checkpoints/step_00000005"
    shutil.copytree(sound, sound.with_name("step_00000007"))
    os.truncate(sound.with_name("step_00000007") / "student.safetensors", 100)
    said = io.StringIO()
    tiny.make_trainer(tmp_path / "cut", config, console=Console(file=said, width=300)).train()
    assert f"resuming {tmp_path}/cut at step 5 (sample 20, epoch 1)." in said.getvalue()
    assert "step_00000007 is damaged (student.safetensors has 100 bytes" in said.getvalue()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path, monkeypatch):
    crash(tiny, tmp_path, 5)
    monkeypatch.setattr(tiny, "WIDTH", 9)
    with pytest.raises(
        CheckpointError,
        match=r"does not fit the model: image.stem.weight is \[6, 12\], the model's \[9, 12\]; image.stem.bias",
    ):
        tiny.make_trainer(tmp_path).train()


class UntilTold:
    """A writer that waits, at a step, until the trainer can know of the checkpoint that failed."""

    def __init__(self, step, trainer_of):
        self.step, self.trainer_of = step, trainer_of

    def scalars(self, step, values):
        while step == self.step and not self.trainer_of().run.checkpoints.fault:
            time.sleep(0.01)

    def pictures(self, step, pictures):
        pass

    sync = close = lambda self: None


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk(tiny, rows, tmp_path, monkeypatch, policy):
    """Checkpoints are due after steps 3, 6, 9 and 10; the disk is full at the first of them."""
    tiny.make_trainer(tmp_path / "whole").train()
    real = shutil.disk_usage

    def full(folder):
        return real(folder)._replace(free=int(trainer.run.state.step > 5) << 30)

    monkeypatch.setattr(shutil, "disk_usage", full)
    config = tiny.make_config(checkpoints={"on_failure": policy})
    trainer = tiny.make_trainer(tmp_path / "full", config, writers=[UntilTold(4, lambda: trainer)])
    if policy == "stop":
        with pytest.raises(StorageError, match=r"checkpoint of step [45] could not be written"):  # tried once more
            trainer.train()
        assert trainer.run.state.step in (4, 5)
        monkeypatch.setattr(shutil, "disk_usage", real)
        trainer = tiny.make_trainer(tmp_path / "full", config)
    trainer.train()
    assert rows(tmp_path / "full") == rows(tmp_path / "whole")
    said = (tmp_path / "full/log.txt").read_text()
    if policy == "continue":
        assert re.search(
            r"WARNING .*: the checkpoint of step 3 could not be written \(\[Errno 28\].*there is none yet; train", said
        )
    else:
        assert re.search(r"the run ended: .*checkpoint of step [45] could not be written \(\[Errno 28\]", said)


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_an_update_that_is_not_finite_makes_no_checkpoint(tiny, tmp_path, monkeypatch, number):
    """Loss and gradient are finite, what the update makes of them is not: the run ends at the next checkpoint, and the
    older one stays.
    """

    @torch.no_grad()
    def after_step(self):
        if self.calls == 5:
            self.scale.fill_(float(number))

    monkeypatch.setattr(tiny.Match, "after_step", after_step)
    config = tiny.make_config(checkpoints={"keep_last": 1})
    words = (
        "step (?:[6-9]|10) was not written, since losses.match.scale of the student is not finite; the last sound "
        "one is of step 3"
    )
    with pytest.raises(TrainingError, match=words):
        tiny.make_trainer(tmp_path, config).train()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000003"]
    assert not (tmp_path / "result.json").exists() and re.search(words, (tmp_path / "log.txt").read_text())


def test_storage_that_fails_saves_what_was_done(tiny, rows, tmp_path):
    tiny.make_trainer(tmp_path / "whole").train()
    trainer = tiny.make_trainer(tmp_path / "cut")
    good = trainer.dataset.read
    trainer.dataset.read = lambda index: (
        good(index) if trainer.run.state.step < 4 else (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    with pytest.raises(StorageError, match=r"storage failed: .*Input/output error"):
        trainer.train()
    assert checkpoint_folders(tmp_path / "cut")[-1].name == "step_00000004"
    tiny.make_trainer(tmp_path / "cut").train()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_an_evaluation_cut_short_is_made_up_for(tiny, rows, tmp_path):
    tiny.make_trainer(tmp_path / "whole", evaluators={"mean": tiny.Mean(), "more": tiny.Mean()}).train()

    class Failing(tiny.Mean):
        def evaluate(self, encoder, *, pictures=False):
            raise Stop

    with pytest.raises(Stop):
        tiny.make_trainer(tmp_path / "cut", evaluators={"mean": tiny.Mean(), "more": Failing()}).train()
    assert checkpoint_folders(tmp_path / "cut")[-1].name == "step_00000005"
    done, owed = tiny.Mean(), tiny.Mean()
    tiny.make_trainer(tmp_path / "cut", evaluators={"mean": done, "more": owed}).train()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert (done.calls, owed.calls) == (2, 4)  # two roles each, at one epoch and at two


def test_bad_samples_are_counted_through_a_restart(tiny, rows, tmp_path):
    crash(tiny, tmp_path, 8, bad=(3,))
    tiny.make_trainer(tmp_path, bad=(3,)).train()
    assert rows(tmp_path)[-1]["bad_samples"] == 2
    assert read_state(checkpoint_folders(tmp_path)[-1])["bad_samples"]["counts"] == {"sample 3": {"undecodable": 2}}


def test_epoch_checkpoints_stay(tiny, tmp_path):
    tiny.make_trainer(
        tmp_path, tiny.make_config(checkpoints={"every_steps": 1, "keep_last": 1, "keep_every_epochs": 1})
    ).train()
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000005", "step_00000010"]


def test_clipped_gradients_are_logged_unclipped(tiny, rows, tmp_path):
    training = {"batch_size": 4, "precision": "fp32", "device": "cpu", "seed": 3}
    tiny.make_trainer(tmp_path / "free").train()
    tiny.make_trainer(tmp_path / "clipped", tiny.make_config(training=training | {"clip_grad_norm": 1e-3})).train()
    free, clipped = rows(tmp_path / "free"), rows(tmp_path / "clipped")
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"] > 1e-3
    assert clipped[0]["match/scale"] == pytest.approx(
        free[0]["match/scale"], rel=1e-4
    )  # AdamW's first step knows signs alone
    assert clipped[3]["loss"] != free[3]["loss"]


def test_logging_leaves_no_trace_behind(tiny, tmp_path):
    logger = logging.getLogger("cosmos_ssl")
    before = (logger.level, logger.propagate, list(logger.handlers))
    tiny.make_trainer(tmp_path).train()
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_the_console_shows_lines_and_a_table(tiny, tmp_path):
    said = io.StringIO()
    tiny.make_trainer(tmp_path, console=Console(file=said, width=200), evaluators={"mean": tiny.Mean()}).train()
    text = said.getvalue()
    assert f"training tiny (121 parameters) into {tmp_path}: 10 steps, 5 an epoch, batch 4, fp32 on cpu" in text
    assert "step  1 of 10  epoch 0.20  loss 2.203  match 2.203  lr 2.50e-02" in text
    assert re.search(
        r"^mean after step 5 \(fp32, \d+\.\d s\): student mean 0\.\d+; teacher mean 0\.\d+$", text, re.MULTILINE
    )
    assert (
        re.search(r"mean mean +│ +0\.\d+ │ +0\.\d+ │", text)
        and f"finished {tmp_path} at step 10 (sample 40, epoch 2)" in text
    )


def test_a_terminal_gets_a_bar(tiny, tmp_path):
    said = io.StringIO()
    tiny.make_trainer(tmp_path, console=Console(file=said, width=160, force_terminal=True)).train()
    assert "10/10" in said.getvalue() and "data wait" in said.getvalue()


def test_unread_parameters_are_named(tiny, tmp_path):
    said = io.StringIO()
    trainer = tiny.make_trainer(tmp_path, console=Console(file=said, width=200))
    object.__setattr__(trainer.assembly, "frozen", ["image.a", "image.b"])
    trainer.train()
    assert "frozen, since no loss reads them: image.a, image.b" in said.getvalue()


@pytest.mark.slow
def test_compiled_towers_train_and_resume(tiny, rows, tmp_path):
    config = tiny.make_config(training={"batch_size": 4, "precision": "fp32", "device": "cpu", "compile": True})
    tiny.make_trainer(tmp_path / "whole", config, evaluators={"mean": tiny.Mean()}).train()
    crash(tiny, tmp_path / "cut", 8, config, evaluators={"mean": tiny.Mean()})
    tiny.make_trainer(tmp_path / "cut", evaluators={"mean": tiny.Mean()}).train()  # not part of a run's identity
    assert [row["step"] for row in rows(tmp_path / "cut")] == [row["step"] for row in rows(tmp_path / "whole")]
    assert set(weights(tmp_path / "cut")) == set(weights(tmp_path / "whole"))


def test_compiling_without_a_compiler_is_refused_at_the_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, tiny.__file__, str(tmp_path / "run"), '{"training": {"compile": true}}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "training.compile: torch cannot compile here" in said
    assert "Install them, or leave training.compile out" in said and "Traceback" not in said
