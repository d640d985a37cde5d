"""SIGKILL at every stage of a checkpoint, SIGTERM and Ctrl-C in real processes."""

import os
import signal
import sys
import time

import pytest

from cosmos_ssl.engine.checkpoint import checkpoint_folders, find_fault

OFTEN = {"every_steps": 2, "keep_last": 1, "keep_every_epochs": 1}


def train_and_die(tiny, run_dir, kill_at):
    """Train in a forked child that kills itself at file operation ``kill_at`` under checkpoints/; True if it got there."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event, arguments):
            nonlocal count
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and "checkpoints" in str(arguments[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            tiny.make_trainer(run_dir, tiny.make_config(checkpoints=OFTEN)).train()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_stage_of_a_checkpoint(tiny, rows, tmp_path):
    tiny.make_trainer(tmp_path / "whole").train()
    expected = rows(tmp_path / "whole")
    stages = 0
    for kill_at in range(1, 60, 3):
        run_dir = tmp_path / f"cut{kill_at}"
        if not train_and_die(tiny, run_dir, kill_at):
            break
        stages += 1
        found = checkpoint_folders(run_dir)
        assert not found or any(find_fault(path) is None for path in found), kill_at
        tiny.make_trainer(run_dir, tiny.make_config(checkpoints=OFTEN)).train()
        assert rows(run_dir) == expected, kill_at
    assert stages > 5  # two checkpoints are waited for, the others depend on how fast the disk is


def test_killed_again_and_again(tiny, rows, tmp_path):
    tiny.make_trainer(tmp_path / "whole").train()
    for kill_at in (9, 17, 21, 13, 30):
        train_and_die(tiny, tmp_path / "cut", kill_at)
    tiny.make_trainer(tmp_path / "cut", tiny.make_config(checkpoints=OFTEN)).train()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


ENDLESS = {"schedule": {"epochs": 100_000, "warmup_steps": 2}, "checkpoints": {"every_steps": None, "every_minutes": 30}}


@pytest.mark.parametrize(
    ("number", "code", "cause"), [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGUSR2, 75, "SIGUSR2"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_signal_saves_and_leaves(tiny, start_tiny, wait_for_step, tmp_path, number, code, cause):
    process = start_tiny(tmp_path, loader={"workers": 1}, **ENDLESS)
    wait_for_step(tmp_path, 3)
    with pytest.raises(Exception, match="in use by a live run \\(process "):
        tiny.make_trainer(tmp_path, tiny.make_config(**ENDLESS), evaluators={"mean": tiny.Mean()}).train()
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    step = int(checkpoint_folders(tmp_path)[-1].name[5:])
    assert f"{cause}: saved {tmp_path} at step {step:,} (sample {4 * step:,}, epoch {step // 5})" in said
    assert "Traceback" not in said


def test_a_signal_is_seen_during_evaluation(start_tiny, wait_for_step, tmp_path):
    process = start_tiny(tmp_path, evaluation_seconds=500)
    wait_for_step(tmp_path, 5)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert checkpoint_folders(tmp_path)[-1].name == "step_00000005"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)])
def test_a_signal_during_start_up_leaves_at_once(start_tiny, tmp_path, number, code):
    process = start_tiny(tmp_path, stuck_start=True)
    assert "starting" in process.stdout.readline()
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert "nothing to save yet" in said and "Traceback" not in said


def test_a_second_ctrl_c_leaves_at_once(start_tiny, wait_for_step, tmp_path):
    process = start_tiny(tmp_path, loader={"workers": 0}, befalls={0: {"loss": {2: "hang"}}}, **ENDLESS)
    wait_for_step(tmp_path, 2)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Ctrl-C: saving; Ctrl-C again leaves at once" in said
    assert not checkpoint_folders(tmp_path)


def test_a_run_that_hangs_ends_and_says_where(start_tiny, tmp_path):
    process = start_tiny(tmp_path, training={"timeout_minutes": 0.03}, befalls={0: {"loss": {2: "hang"}}}, loader={"workers": 1}, **ENDLESS)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 74, said
    assert "nothing has happened for 0.03 min (training.timeout_minutes): rank 0, step 3; loader worker 0: collecting the batch" in said
    assert "in forward" in (tmp_path / "log.txt").read_text().partition("stacks of all threads:")[2]
