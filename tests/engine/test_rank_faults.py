"""What goes wrong on one of two ranks, as real processes: all of them end, say why, leave nothing running and lose
nothing.
"""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cosmos_ssl.api import Sample
from cosmos_ssl.data import Loader, Order, load_manifest
from cosmos_ssl.engine.checkpoint import checkpoint_folders, find_fault
from cosmos_ssl.errors import StorageError
from cosmos_ssl.testing.examples import small_config

IMPATIENT = {"training": {"timeout_minutes": 0.1}}
COLLECTIVE = r"torch/distributed/distributed_c10d\.py\", line|engine/exchange\.py\", line \d+ in finish"
HANGS = "nothing has happened for 0.1 min (training.timeout_minutes): "


@pytest.fixture
def alive(start_tiny, tmp_path, monkeypatch):
    """Processes that this test started, with all their children: process id -> (parent, rank).

    Ends them after the test.
    """
    mark = f"STARTED_BY={tmp_path}"
    monkeypatch.setenv(*mark.split("=", 1))

    def alive():
        found, sessions = {}, {process.pid for process in start_tiny.started}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it has just ended
                continue
            if state != "Z" and (mark in environment or int(session) in sessions):
                found[int(folder.name)] = (
                    int(parent),
                    next((text[5:] for text in environment if text.startswith("RANK=")), None),
                )
        return found

    yield alive
    for process in alive():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.fixture
def none_left(alive):
    """Wait until every process that this test started has ended; what the kernel ends with its parent takes a
    moment.
    """

    def none_left():
        end = time.monotonic() + 30
        while found := alive():
            assert time.monotonic() < end, found
            time.sleep(0.05)

    return none_left


def stacks(log):
    """What a rank's log holds below the watchdog's line."""
    before, found, after = log.read_text().partition("stacks of all threads:")
    assert found, before
    return after


# ---------------------------------------------------------------------------- a rank that hangs


def test_a_part_that_hangs_on_one_rank_ends_all(ranks, finished, none_left, tmp_path):
    """Each rank says where it stood: the one in the part, the other in a collective.

    The other is the first to lose patience: it would hear that the one in the part has gone.
    """
    own = {0: {"training": {"timeout_minutes": 0.05}}}
    processes = ranks(tmp_path, 2, own, befalls={1: {"loss": {4: "hang"}}}, loader={"workers": 1}, **IMPATIENT)
    codes, said = finished(processes)
    assert codes == [74, 74], said
    for rank, log in enumerate((tmp_path / "log.txt", tmp_path / "log.rank1.txt")):
        told = f"{HANGS if rank else HANGS.replace('0.1', '0.05')}rank {rank}, step 5"
        assert told in said[rank]
        assert f"Stacks of all threads are in {log}" in said[rank]
        assert told in log.read_text()
    assert "in befall" in stacks(tmp_path / "log.rank1.txt")
    assert re.search(COLLECTIVE, stacks(tmp_path / "log.txt"))
    none_left()


@pytest.fixture
def launch(install, tmp_path):
    """Start ``cosmos-launch`` on two ranks, pictures alone, with an augmenter of another package.

    ``grace``: seconds that a rank has to follow one that failed.
    """
    started = []

    def launch(grace=20.0, **training):
        code = (
            f"import sys; from cosmos_ssl_launch import local, main; local.GRACE = {grace}; "
            "sys.exit(main(sys.argv[1:]))"
        )
        site = install("my-parts", "0.3.1", entries=ENTRIES, modules={"my_parts": PARTS})
        tree = small_config(str(tmp_path), 100_000, {**PICTURES_ALONE, "training": training, "loader": {"workers": 1}})
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps({**tree, "extends": "quickstart"}))
        command = [sys.executable, "-c", code, "--config", str(config), "profile.nproc=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=tmp_path))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.communicate()


ENTRIES = {"losses/spread": "my_parts:Spread", "augmenters/faulty": "my_parts:Faulty"}
PARTS = """
import os
from cosmos_ssl.api import Augmenter, ImageCrops, ImageGroup, Loss, LossOutput, Need, ViewSpec
import torch

class Spread(Loss):
    def __init__(self, spec): super().__init__()
    def requires(self): return [Need(modality="image")]
    def forward(self, ctx): return LossOutput(terms={"spread": ctx.student.image["global"].unit.std(1).mean()})

class Faulty(Augmenter):
    modality = "image"
    calls = 0
    def __init__(self, spec): pass
    def offers(self): return {"global": ViewSpec(views=1, size=32)}
    def finish(self, group): return ImageGroup(pixels=group.pixels / 255, params=group.params)
    def crop(self, sample, rng):
        self.calls += 1
        if os.environ["RANK"] == os.environ.get("FAULTY_RANK") and self.calls > 12:
            raise KeyError("x")
        return {"global": ImageCrops(pixels=sample.decode()[None], params=torch.zeros(1, 0))}
"""
PICTURES_ALONE = {"model": {"text": None}, "tokenizer": None, "heads": None, "teacher": {"type": "none"}}
PICTURES_ALONE |= {"augmenters": {"image": {"type": "faulty"}, "text": None}}
PICTURES_ALONE |= {"losses": {"clip": None, "distill": None, "spread": {"type": "spread"}}}


def test_a_rank_that_is_stopped_is_killed_by_the_launcher(launch, wait_for_step, alive, none_left, tmp_path):
    """It cannot say a thing; the other one says that it waits for it, and the command ends."""
    command = launch(grace=1.0, timeout_minutes=0.1)
    wait_for_step(tmp_path / "run", 3)
    [stopped] = [process for process, (parent, rank) in alive().items() if parent == command.pid and rank == "1"]
    os.kill(stopped, signal.SIGSTOP)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 74, out + err
    assert re.search(re.escape(HANGS) + r"rank 0, step [\d,]+", err), err
    assert "rank 1 has not ended 1 s after another one failed, and is killed" in err
    assert re.search(COLLECTIVE, stacks(tmp_path / "run" / "log.txt"))
    none_left()


# ---------------------------------------------------------------------------- a part that fails on one rank


def test_a_rank_that_has_come_apart_ends_all(ranks, finished, none_left, tmp_path):
    """What is to be saved is compared first: the checkpoint of step 3 stays the newest."""
    codes, said = finished(ranks(tmp_path, 2, befalls={1: {"teacher": {4: "drift"}}}))
    assert codes == [1, 1], said
    told = "ranks have come apart: teacher.image.stem.weight of rank 1 is not the first rank's"
    told += " (tensors that differ: 1). model.image does not do the same on all ranks"
    assert all(told in words for words in said), said
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000003"]
    none_left()


@pytest.mark.parametrize(("rank", "place"), [(1, "losses.match"), (0, "teacher")])
def test_a_part_that_raises_on_one_rank_ends_all(ranks, finished, none_left, tmp_path, rank, place):
    kind = place.partition(".")[0].replace("losses", "loss")
    codes, said = finished(ranks(tmp_path, 2, befalls={rank: {kind: {4: "raise"}}}, loader={"workers": 1}))
    assert (codes[rank], codes[1 - rank]) == (2, 74), said
    assert f"{place} (tests) failed: RuntimeError: no {kind} any more\n" in said[rank]
    assert "another rank was lost" in said[1 - rank]
    assert "Traceback" not in said[0] + said[1]
    assert "in befall" in (tmp_path / f"log.rank{rank}.txt" if rank else tmp_path / "log.txt").read_text()
    none_left()


def test_the_launcher_ends_with_what_the_failing_rank_says(launch, monkeypatch, none_left, tmp_path):
    monkeypatch.setenv("FAULTY_RANK", "1")
    command = launch()
    out, err = command.communicate(timeout=120)
    assert command.returncode == 1, out + err
    last = err.splitlines()[-1]
    worker = (
        r"data: loader worker 0, step 3, augmenters\.image \('faulty' of my-parts 0\.3\.1\) on sample \S+ "
        r"of \S+: KeyError: 'x'"
    )
    assert re.fullmatch(rf"rank 1 ended with exit code 1: {worker}", last), err
    assert "another rank was lost" in err and "Traceback" not in out + err
    assert 'my_parts.py", line' in (tmp_path / "run" / "log.rank1.txt").read_text()
    none_left()


# ---------------------------------------------------------------------------- a loader worker that hangs or is killed


def write_shards(folder):
    """5 shards of 4 samples; their names."""
    urls = [str(folder / f"a-{number:03d}.tar") for number in range(5)]
    folder.mkdir()
    for number, url in enumerate(urls):
        with tarfile.open(url, "w") as tar:
            for sample in range(4 * number, 4 * number + 4):
                info = tarfile.TarInfo(f"{sample:03d}.jpg")
                info.size = 600
                tar.addfile(info, io.BytesIO(bytes(600)))
    return urls


def test_a_read_that_never_returns_ends_all(tiny, ranks, finished, none_left, tmp_path):
    """A shard that has become a pipe stands for storage that does not answer: rank, step, worker and shard are
    named.
    """
    urls = write_shards(tmp_path / "shards")
    manifest = load_manifest(urls)
    Path(urls[2]).unlink()
    os.mkfifo(urls[2])
    shards = {"urls": urls, "manifest": str(manifest.path)}
    processes = ranks(tmp_path / "run", 2, shards=shards, loader={"workers": 1}, **IMPATIENT)
    codes, said = finished(processes)
    assert codes == [74, 74], said
    named = r"rank (\d), step (\d+); loader worker 0: reading sample (\d+) of a-002.tar\. Stacks"
    found = re.findall(re.escape(HANGS) + named, said[0] + said[1])
    config = tiny.make_config()
    order = Order(
        manifest.sizes,
        4,
        lanes=config.lanes,
        shuffle_samples=config.loader.shuffle_samples,
        seed=config.training.seed,
    )
    first = next(step for step in range(5) if any(8 <= sample < 12 for sample in order.rank_batch(step, 0, 1)))
    assert found and {int(step) for _, step, _ in found} == {first + 1}, said
    assert all(
        8 <= int(sample) < 12 and int(sample) in order.rank_batch(first, int(rank), 2) for rank, _, sample in found
    )
    none_left()


def test_a_pipe_among_the_shards_is_refused_at_the_start(tmp_path):
    urls = write_shards(tmp_path / "shards")
    Path(urls[2]).unlink()
    os.mkfifo(urls[2])
    command = [
        sys.executable,
        "-c",
        "import sys; from cosmos_ssl.cli import main; sys.exit(main())",
        "data",
        "index",
        *urls,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"data: {urls[2]} is no regular file\n")


def test_a_batch_that_breaks_off_is_a_lost_worker(tiny):
    """A worker that is killed while it sends closes its pipe some time before it has ended."""

    class Torn:
        def __reduce__(self):
            return pickle.loads, (b"",)

    class Data(tiny.Numbers):
        def read(self, index):
            return Sample(key=str(index), extras={"torn": Torn()})

    data = Data()
    loader = Loader(
        data, Order(data.shard_sizes, 4, lanes=4, shuffle_samples=20, seed=0), image=tiny.Noise(), workers=1
    )
    with pytest.raises(StorageError, match=r"^data: the loader failed: Ran out of input$"):
        next(loader.batches(0, 5))


WIDE = {"width": 200}  # checkpoints of 0.7 MiB


@pytest.fixture
def undisturbed(ranks, finished, rows, tmp_path_factory):
    """Rows of a wide run of two ranks that nothing befell; made once."""
    if not _undisturbed:
        folder = tmp_path_factory.mktemp("undisturbed")
        codes, said = finished(ranks(folder, 2, **WIDE))
        assert codes == [0, 0], said
        _undisturbed.extend(rows(folder))
    return _undisturbed


_undisturbed = []


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_loader_worker_that_is_killed_ends_all(ranks, finished, none_left, rows, undisturbed, tmp_path, rank):
    """As the kernel does it when memory is short.

    The first rank saves where it stands; the same command goes on to the same numbers.
    """
    codes, said = finished(ranks(tmp_path, 2, befalls={rank: {"crop": {11: "die"}}}, loader={"workers": 1}, **WIDE))
    assert codes == [74, 74], said
    assert re.search(
        r"data: a loader worker was lost \(process \d+, SIGKILL; out of memory\? Lower loader.workers\)", said[rank]
    ), said
    assert "another rank was lost" in said[1 - rank]
    if rank == 0:
        assert int(checkpoint_folders(tmp_path)[-1].name[5:]) == rows(tmp_path)[-1]["step"]
    none_left()
    codes, said = finished(ranks(tmp_path, 2, loader={"workers": 1}, **WIDE))
    assert codes == [0, 0], said
    assert rows(tmp_path) == undisturbed


# ---------------------------------------------------------------------------- a disk that is full

OFTEN = {
    "every_steps": 3,
    "keep_last": 1,
    "keep_every_epochs": 1,
}  # the save after an epoch waits for the one before it
LIMITED = {0: {"loss": {5: "limit"}}}  # the first rank can write no checkpoint from its step 6 on


@pytest.fixture
def small_disk(tmp_path):
    """A folder for a run with room for one wide checkpoint, and a call that makes room for more; None where none can be
    mounted.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=1200k", "none", folder], capture_output=True, check=False).returncode:
        yield folder, None
    else:
        yield folder, lambda: subprocess.run([*mount, "remount,size=8m", "none", folder], check=True)
        subprocess.run(["umount", "-l", folder], check=True)


def sound_checkpoints(run_dir):
    """Their steps, and that there is nothing else."""
    found = checkpoint_folders(run_dir)
    assert found and [find_fault(path) for path in found] == [None] * len(found)
    assert sorted((run_dir / "checkpoints").iterdir()) == found
    return [int(path.name[5:]) for path in found]


UNSAVED = r": the checkpoint of step (\d+) could not be written \((.*)\), the last sound one is of step (\d+)"


def test_a_full_disk(small_disk, ranks, finished, none_left, rows, undisturbed):
    """All ranks train to the end and fail there; with room again the same command finishes."""
    folder, make_room = small_disk
    codes, said = finished(ranks(folder, 2, befalls={} if make_room else LIMITED, checkpoints=OFTEN, **WIDE))
    assert codes == [74, 74], said
    assert rows(folder) == undisturbed
    saved = sound_checkpoints(folder)
    for words in said:  # the first rank could not, and the other hears of it
        step, why, last = re.search(f"^{folder}{UNSAVED}$", words, re.MULTILINE).groups()
        assert (int(step), int(last)) == (10, saved[-1])
    if make_room:
        assert saved == [3] and re.search(r"\d\.\d MiB needed, 0\.\d MiB free", why)
        make_room()
    assert (
        "could not be written" in (folder / "log.txt").read_text()
        and "; training goes on" in (folder / "log.txt").read_text()
    )
    codes, said = finished(ranks(folder, 2, checkpoints=OFTEN, **WIDE))
    assert codes == [0, 0], said
    assert rows(folder) == undisturbed
    none_left()


def test_a_checkpoint_that_fails_midway_ends_all_where_asked(ranks, finished, none_left, tmp_path):
    options = {"checkpoints": OFTEN | {"on_failure": "stop"}, "schedule": {"epochs": 100_000, "warmup_steps": 2}}
    codes, said = finished(ranks(tmp_path, 2, befalls=LIMITED, **options, **WIDE))
    assert codes == [74, 74], said
    _, why, last = re.search(
        rf"^{tmp_path}{UNSAVED} \(checkpoints\.on_failure: stop\)$", said[1], re.MULTILINE
    ).groups()
    assert "File too large" in why and sound_checkpoints(tmp_path)[-1] == int(last)
    assert re.search(f"^{tmp_path}{UNSAVED}", said[0], re.MULTILINE), said
    none_left()
