"""SIGKILL at every stage of a checkpoint, SIGTERM and Ctrl-C in real processes."""

import os
import re
import shutil
import signal
import sys
import threading

import pytest

from cosmos_ssl.engine.checkpoint import checkpoint_folders, latest_checkpoint

SHORT = {
    "schedule": {"max_steps": 4},
    "checkpoints": {"every_steps": 2, "keep_last": 1, "shards": 2},
}  # two saves, in two files a role; the second removes the first
OPERATIONS = {"open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"}
SAVING = ("engine/checkpoint.py", "engine/background.py")


def train_and_die(tiny, run_dir, kill_at=None, kept=None):
    """Train in a forked child that kills itself before file operation ``kill_at`` of its checkpoints; the names of the
    operations it began.

    Of the many writes of a file two count: the one that begins it, and one that finds it half written. ``kept``: a
    folder for what the run's folder held before each operation, which is what a kill would leave there.
    """
    told = run_dir.with_suffix(".operations")
    child = os.fork()
    if child == 0:
        tell, writes = told.open("wb", buffering=0), []

        def watch(frame, event, called):
            name = getattr(called, "__name__", "")
            if event != "c_call" or name not in OPERATIONS or not is_saving(frame):
                return
            writes[:] = [*writes, name] if name == "write" else []
            if len(writes) <= 2:
                tell.write(f"{name}\n".encode())
                watch.begun += 1
                if kept is not None:
                    shutil.copytree(run_dir, kept / str(watch.begun))
                if watch.begun == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        watch.begun = 0
        threading.setprofile(watch)
        sys.setprofile(watch)
        try:
            tiny.make_trainer(run_dir, tiny.make_config(**SHORT)).train()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return told.read_text().split()


def is_saving(frame):
    while frame is not None:
        if frame.f_code.co_filename.endswith(SAVING):
            return True
        frame = frame.f_back
    return False


def test_killed_at_any_stage_of_a_checkpoint(tiny, rows, tmp_path):
    """Before every single operation: what was given its name is sound, and the same command goes on to the same
    numbers.

    One run leaves what a kill before each would; that a kill leaves it is seen below, and here of one.
    """
    tiny.make_trainer(tmp_path / "whole", tiny.make_config(**SHORT)).train()
    whole = train_and_die(tiny, tmp_path / "watched", kept=tmp_path / "kept")
    assert set(whole) >= {"open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"}
    named = whole.index("rename")
    assert whole[:named].count("open") == whole[:named].count("fsync") and whole[named + 1 :][:2] == [
        "open",
        "fsync",
    ]  # for a power cut
    assert rows(tmp_path / "watched") == rows(tmp_path / "whole")
    at = len(whole) // 2
    assert train_and_die(tiny, tmp_path / "killed", at) == whole[:at]
    assert checkpoints(tmp_path / "killed") == checkpoints(tmp_path / "kept" / str(at))
    for kill_at in range(1, len(whole) + 1):
        run_dir, begun = tmp_path / "kept" / str(kill_at), whole[:kill_at]
        saved = latest_checkpoint(run_dir)
        assert (saved and saved.name) == (None, "step_00000002", "step_00000004")[begun[:-1].count("rename")], begun
        tiny.make_trainer(run_dir, tiny.make_config(**SHORT)).train()
        assert rows(run_dir) == rows(tmp_path / "whole"), begun


def checkpoints(run_dir):
    """What lies in a run's folder of checkpoints: name -> size."""
    folder = run_dir / "checkpoints"
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_killed_again_and_again(tiny, rows, tmp_path):
    tiny.make_trainer(tmp_path / "whole", tiny.make_config(**SHORT)).train()
    for kill_at in (9, 17, 21, 13, 20):
        assert len(train_and_die(tiny, tmp_path / "cut", kill_at)) == kill_at
    tiny.make_trainer(tmp_path / "cut", tiny.make_config(**SHORT)).train()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


ENDLESS = {
    "schedule": {"epochs": 100_000, "warmup_steps": 2},
    "checkpoints": {"every_steps": None, "every_minutes": 30},
}


@pytest.mark.parametrize(
    ("number", "code", "cause"),
    [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGUSR2, 75, "SIGUSR2"), (signal.SIGINT, 130, "Ctrl-C")],
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


def test_a_signal_is_seen_during_evaluation(start_tiny, tmp_path):
    process = start_tiny(tmp_path, evaluation_seconds=500)
    process.wait_for("evaluates")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "SIGTERM: the evaluation ends after the batch under way, then all is saved\n" in said
    assert checkpoint_folders(tmp_path)[-1].name == "step_00000005"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)])
def test_a_signal_during_start_up_leaves_at_once(start_tiny, tmp_path, number, code):
    process = start_tiny(tmp_path, stuck_start=True)
    process.wait_for("starting")
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert "nothing to save yet" in said and "Traceback" not in said


def test_a_start_that_hangs_ends(start_tiny, tmp_path):
    """Before the data are read, as where the file system hangs: it is said who, and where."""
    process = start_tiny(tmp_path, stuck_start=True, training={"timeout_minutes": 0.02})
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 74, said
    assert "(training.timeout_minutes): rank 0, at the start. Stacks of all threads are in" in said
    assert "in identity" in (tmp_path / "log.txt").read_text()


def test_a_second_ctrl_c_leaves_at_once(start_tiny, tmp_path):
    process = start_tiny(tmp_path, loader={"workers": 0}, befalls={0: {"loss": {2: "hang"}}}, **ENDLESS)
    process.wait_for("hangs")
    process.send_signal(signal.SIGINT)
    process.wait_for("Ctrl-C again leaves at once")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130
    told = r"Ctrl-C: the step under way ends first, then all is saved \(a step takes about \d s\); Ctrl-C again leaves"
    assert re.search(told, said) and re.search(told, (tmp_path / "log.txt").read_text())
    assert not checkpoint_folders(tmp_path)


def test_a_run_that_hangs_ends_and_says_where(start_tiny, tmp_path):
    process = start_tiny(
        tmp_path,
        training={"timeout_minutes": 0.1},
        befalls={0: {"loss": {2: "hang"}}},
        loader={"workers": 1},
        **ENDLESS,
    )
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 74, said
    assert (
        "nothing has happened for 0.1 min (training.timeout_minutes): rank 0, step 3; loader worker 0: "
        "collecting the batch" in said
    )
    assert "in forward" in (tmp_path / "log.txt").read_text().partition("stacks of all threads:")[2]


def test_a_run_whose_interpreter_hangs_ends_too(start_tiny, tmp_path):
    process = start_tiny(tmp_path, training={"timeout_minutes": 0.06}, befalls={0: {"loss": {2: "stick"}}}, **ENDLESS)
    process.communicate(timeout=120)
    assert process.returncode == 1
    assert "in befall" in (tmp_path / "log.txt").read_text().partition("Timeout (")[2]
