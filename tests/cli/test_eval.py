"""``cosmos-ssl eval``: a tiny run from the command line, on one rank and on two, interrupted, and what is wrongly
given.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch.distributed import TCPStore

import cosmos_ssl
from cosmos_ssl.data.scenes import SceneOptions, write_scenes
from cosmos_ssl.errors import CosmosError, UserError

Command = Callable[..., tuple[int, str, str]]
GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "official_checkpoint.pt"
RUN = "import sys; from cosmos_ssl.cli import main; sys.exit(main(sys.argv[1:]))"
TOWERS = {
    "image": {"type": "clip_vit", "width": 32, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 32},
    "text": {"type": "clip_text", "width": 32, "layers": 1, "heads": 2},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Validation shards of 40 scenes."""
    options = SceneOptions(train_samples=16, validation_samples=40, image_size=32, shard_samples=20)
    return options.pattern(write_scenes(tmp_path_factory.mktemp("scenes"), options), "val")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: str) -> tuple[Path, dict[str, float]]:
    """A run folder of two steps, and what its own evaluators found."""
    folder = tmp_path_factory.mktemp("run") / "run"
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"embed_dim": 16, **TOWERS},
        "tokenizer": {"type": "clip", "context_length": 32},
        "augmenters": {
            "image": {"type": "multi_crop", "global_crops_size": 32, "local_crops_number": 0},
            "text": {"type": "text_crop", "num_sampled_captions": 2},
        },
        "losses": {"clip": {"type": "clip"}},
        "teacher": {"type": "ema", "momentum_teacher": 0.5},
        "data": {"type": "scenes", "train_samples": 16, "validation_samples": 8, "image_size": 32},
        "loader": {"workers": 0},
        "schedule": {"epochs": 1, "max_steps": 2, "warmup_steps": 1},
        "training": {"batch_size": 8, "precision": "fp32", "device": "cpu"},
        "evaluators": {
            "retrieval": {"type": "retrieval", "data": shards},
            "classification": {"type": "classification", "data": shards},
            "knn": {"type": "knn", "data": shards, "train_data": shards, "k": 5, "max_samples": 30},
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
        return folder, cosmos_ssl.train(tree)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "cosmos_ssl" / "evaluations"


def own(metrics: dict[str, float], evaluator: str) -> dict[str, float]:
    """The numbers of one evaluator of a run, as ``ROLE/NAME``."""
    return {
        name.removeprefix(f"{evaluator}/"): value for name, value in metrics.items() if name.startswith(f"{evaluator}/")
    }


def test_help_starts_without_torch() -> None:
    code = (
        "import sys\nfrom cosmos_ssl.cli import main\ntry: main(['eval', '--help'])\nexcept SystemExit: "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "--allow-missing" in done.stdout


def test_retrieval_is_the_evaluators(
    command: Command, trained: tuple[Path, dict[str, float]], shards: str, tmp_path: Path
) -> None:
    folder, metrics = trained
    report = tmp_path / "e.json"
    code, out, err = command(
        "eval", "--checkpoint", str(folder), "--task", "retrieval", "--data", shards, "--json", str(report)
    )
    assert code == 0, err
    found = json.loads(report.read_text())
    assert found["task"] == "retrieval" and found["checkpoint"] == str(folder / "checkpoints" / "step_00000002")
    about = (
        found["data"],
        found["set"],
        found["texts"],
        found["samples"],
        found["precision"],
        found["device"],
        found["roles"],
    )
    assert about == (shards, "", "txt", 40, "fp32", "cpu", ["student", "teacher"])
    assert "40 samples, fp32 on cpu" in out
    assert found["metrics"] == pytest.approx(own(metrics, "retrieval")) and len(found["metrics"]) == 20
    assert out.splitlines()[0].split() == ["METRIC", "STUDENT", "TEACHER"] and "image_to_text_R@1 (%)" in out


def test_in_python(command: Command, trained: tuple[Path, dict[str, float]], shards: str, tmp_path: Path) -> None:
    """The functions are what the commands call; a model that is in memory is evaluated alike."""
    folder, metrics = trained
    report = cosmos_ssl.evaluate(folder, "retrieval", shards, which="teacher")
    assert (
        command(
            "eval",
            "--checkpoint",
            str(folder),
            "--task",
            "retrieval",
            "--data",
            shards,
            "--json",
            str(tmp_path / "e.json"),
        )[0]
        == 0
    )
    assert {
        **json.loads((tmp_path / "e.json").read_text()),
        "metrics": report["metrics"],
        "roles": ["teacher"],
    } == report
    assert report["metrics"] == pytest.approx(
        {n: v for n, v in own(metrics, "retrieval").items() if n.startswith("teacher")}
    )
    model = cosmos_ssl.load(folder, "teacher")
    loaded = cosmos_ssl.evaluate(model, "retrieval", shards)
    assert {name.replace("model/", "teacher/"): value for name, value in loaded["metrics"].items()} == report["metrics"]
    seen = cosmos_ssl.evaluate(model, "classification", shards, templates=["a {}"], precision="amp_bf16", max_samples=9)
    assert (seen["samples"], seen["precision"], seen["templates"]) == (9, "amp_bf16", ["a {}"]) and model.dtype is None
    for wrong in (
        {"task": "retreival"},
        {"device": "abacus"},
        {"precision": "fp64"},
        {"templates": "foo"},
        {"set_name": "x"},
    ):
        with pytest.raises(UserError, match="--"):
            cosmos_ssl.evaluate(model, **{"task": "classification", "data": shards, **wrong})


def test_precision_is_the_runs_own(
    command: Command, trained: tuple[Path, dict[str, float]], shards: str, tmp_path: Path
) -> None:
    """Where the device is fast in it; the evaluators of a run are asked in that, too."""
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["training"]["precision"] = "amp_bf16"
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    words = (
        "eval",
        "--checkpoint",
        str(folder),
        "--task",
        "retrieval",
        "--data",
        shards,
        "--json",
        str(tmp_path / "e.json"),
    )
    for fast, given, used in (
        (True, (), "amp_bf16"),
        (False, (), "fp32"),
        (False, ("--precision", "bf16"), "amp_bf16"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cosmos_ssl.build.evaluate.has_fast_path", lambda precision, device, fast=fast: fast)
            code, out, err = command(*words, *given)
        assert code == 0 and f"40 samples, {used} on cpu" in out, err
        assert json.loads((tmp_path / "e.json").read_text())["precision"] == used


def test_classification_is_the_evaluators(
    command: Command, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    folder, metrics = trained
    report = tmp_path / "e.json"
    for task in ("classification", "knn"):
        code, out, err = command("eval", "--checkpoint", str(folder), "--task", task, "--json", str(report))
        assert code == 0 and "top1 (%)" in out, err
        found = json.loads(report.read_text())["metrics"]
        assert found == pytest.approx(own(metrics, task)) and len(found) == 6


def test_a_folder_of_classes(command: Command, trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        for name, shade in (("black square", 0), ("white square", 255)):
            for n in range(count):
                path = tmp_path / split / name / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (abs(shade - n),) * 3).save(path)
    report = tmp_path / "e.json"
    words = ("eval", "--checkpoint", str(trained[0]), "--data", str(tmp_path / "test"), "--json", str(report))
    for task in ("knn", "linear_probe", "attentive_probe"):
        code, _, err = command(*words, "--task", task, "--train-data", str(tmp_path / "train"), "-k", "3")
        assert code == 0, err
        assert json.loads(report.read_text())["metrics"]["student/top1"] == 1
    whole = (
        "eval",
        "--checkpoint",
        str(trained[0]),
        "--data",
        str(tmp_path),
        "--json",
        str(report),
    )  # train/ is learned from
    for more in ((), ("--train-data", str(tmp_path))):
        assert command(*whole, "--task", "knn", "-k", "3", *more)[0] == 0
        found = json.loads(report.read_text())
        assert found["metrics"]["student/top1"] == 1 and (found["samples"], found["k"]) == (6, 3)
    assert command(*words, "--task", "classification", "--templates", "a {}")[0] == 0
    assert json.loads(report.read_text())["classes"] == 2
    code, _, err = command(*words, "--task", "linear_probe")
    assert code == 2 and err.startswith("--train-data: name the training samples")
    (tmp_path / "names").write_text("a\nb\nc\n")
    code, _, err = command(*words, "--task", "classification", "--class-names", str(tmp_path / "names"))
    assert code == 2 and err == "--class-names: 3 class names are given for 2 classes\n"


def test_labels_that_are_no_class(command: Command, trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    (tmp_path / "names").write_text("circle\nsquare\n")
    code, _, err = command(
        "eval",
        "--checkpoint",
        str(trained[0]),
        "--task",
        "classification",
        "--class-names",
        str(tmp_path / "names"),
        "--which",
        "student",
    )
    assert code == 2 and "which is none of the 2 class names" in err


def test_segmentation(command: Command, trained: tuple[Path, dict[str, float]], shards: str, tmp_path: Path) -> None:
    report = tmp_path / "e.json"
    words = (
        "eval",
        "--checkpoint",
        str(trained[0]),
        "--task",
        "segmentation",
        "--json",
        str(report),
        "--templates",
        "a {}",
    )
    code, out, err = command(*words, "--data", shards)
    assert code == 0 and "miou (%)" in out and "note:" not in out, err
    found = json.loads(report.read_text())["metrics"]
    assert set(found) == {
        f"{role}/{name}" for role in ("student", "teacher") for name in ("miou", "mean_accuracy", "pixel_accuracy")
    }
    assert all(0 <= value <= 1 for value in found.values())
    assert command(*words, "--data", shards, "--no-csa")[0] == 0
    assert json.loads(report.read_text())["metrics"] != found
    top = tmp_path / "VOC2012"
    for n in range(2):
        for folder, end, mode in (("JPEGImages", "jpg", "RGB"), ("SegmentationClass", "png", "L")):
            (top / folder).mkdir(parents=True, exist_ok=True)
            Image.new(mode, (60, 40), n).save(top / folder / f"{n}.{end}")
    (top / "ImageSets/Segmentation").mkdir(parents=True)
    (top / "ImageSets/Segmentation/val.txt").write_text("0\n1\n")
    code, out, err = command(*words, "--data", str(tmp_path), "--set", "voc21", "--which", "teacher")
    assert code == 0 and "note: the words for the background are our own, not SCLIP's" in out, err
    code, _, err = command(*words, "--data", str(tmp_path))
    assert code == 2 and "--set voc20" in err


def test_winoground(command: Command, trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    rows = [
        {"image_0": f"{n}a", "image_1": f"{n}b", "caption_0": "a circle on a star", "caption_1": "a star on a circle"}
        for n in range(3)
    ]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "images").mkdir()
    for n in range(3):
        for side, shade in (("a", 0), ("b", 200)):
            Image.new("RGB", (32, 32), (shade, n, 0)).save(tmp_path / f"images/{n}{side}.png")
    words = (
        "eval",
        "--checkpoint",
        str(trained[0]),
        "--task",
        "winoground",
        "--data",
        str(tmp_path),
        "--json",
        str(tmp_path / "e.json"),
    )
    code, out, err = command(*words)
    assert code == 0 and "group_score (%)" in out, err
    model = cosmos_ssl.load(trained[0])
    texts = model.encode_text(model.tokenize(["a circle on a star", "a star on a circle"]))
    right = []
    for n in range(3):
        pixels = [model.preprocess(Image.open(tmp_path / f"images/{n}{side}.png")) for side in "ab"]
        scores = torch.stack([model.encode_image(one[None])[0] @ texts.T for one in pixels])
        right.append(bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0]))
    assert json.loads((tmp_path / "e.json").read_text())["metrics"]["student/text_score"] == pytest.approx(
        sum(right) / 3
    )
    (tmp_path / "images/1b.png").write_bytes(b"no picture")
    assert command(*words)[0] == 2 and command(*words, "--allow-missing")[0] == 0
    code, _, err = command("eval", "--checkpoint", str(trained[0]), "--task", "mmvp", "--data", str(tmp_path))
    assert code == 2 and "Questions.csv cannot be read" in err


def test_data_is_that_of_the_run(command: Command, trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    folder, metrics = trained
    report = tmp_path / "e.json"
    checkpoint = next((folder / "checkpoints").iterdir())
    assert (
        command(
            "eval", "--checkpoint", str(checkpoint), "--task", "retrieval", "--which", "teacher", "--json", str(report)
        )[0]
        == 0
    )
    found = json.loads(report.read_text())["metrics"]
    assert found == pytest.approx(
        {name: value for name, value in own(metrics, "retrieval").items() if name.startswith("teacher/")}
    )


def test_an_interrupted_evaluation_goes_on(
    command: Command, trained: tuple[Path, dict[str, float]], shards: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cosmos_ssl.models.encoder import ModelEncoder

    words = (
        "eval",
        "--checkpoint",
        str(trained[0]),
        "--task",
        "retrieval",
        "--data",
        shards,
        "--which",
        "student",
        "--batch-size",
        "8",
    )
    encode, calls = ModelEncoder.match_image, []

    def counted(self: ModelEncoder, pixels: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(ModelEncoder, "match_image", counted)
    assert command(*words)[0] == 130
    assert len(list(cache.rglob("*.pt"))) == 3
    calls.clear()
    code, out, err = command(*words)
    assert code == 0, err
    assert calls == [8, 8] and not list(cache.rglob("*.pt"))
    monkeypatch.undo()
    assert command(*words)[1] == out


def test_what_is_kept_is_of_one_checkpoint(
    command: Command,
    trained: tuple[Path, dict[str, float]],
    shards: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights and config decide: another role, and the same weights in another model, begin anew."""
    from cosmos_ssl.models.encoder import ModelEncoder

    other = tmp_path / "run"
    shutil.copytree(trained[0], other)
    config = other / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["model"]["text"]["heads"] = 4  # no weight tells it
    config.write_text(yaml.safe_dump(tree))
    report = tmp_path / "e.json"

    def words(run: Path, role: str) -> list[str]:
        words = [
            "eval",
            "--checkpoint",
            str(run),
            "--task",
            "retrieval",
            "--data",
            shards,
            "--which",
            role,
            "--batch-size",
            "8",
        ]
        return [*words, "--json", str(report)]

    expected = []
    for run, role in ((other, "student"), (trained[0], "teacher")):
        assert command(*words(run, role))[0] == 0
        expected.append(json.loads(report.read_text())["metrics"])
    encode, calls = ModelEncoder.match_text, []

    def counted(self: ModelEncoder, tokens: Any) -> Any:
        calls.append(len(tokens))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, tokens)

    monkeypatch.setattr(ModelEncoder, "match_text", counted)
    assert command(*words(trained[0], "student"))[0] == 130
    left = set(cache.iterdir())
    assert len(left) == 1
    for run, role in ((other, "student"), (trained[0], "teacher")):
        calls[:] = [0] * 3
        assert command(*words(run, role))[0] == 0
        assert calls[3:] == [8] * 5
        assert json.loads(report.read_text())["metrics"] == expected.pop(0)
    assert set(cache.iterdir()) == left
    os.utime(left.pop(), (0, 0))
    assert command(*words(other, "student"))[0] == 0 and not list(cache.iterdir())


@pytest.mark.parametrize("task", ["retrieval", pytest.param("linear_probe", marks=pytest.mark.slow)])
def test_two_ranks_find_the_same(
    command: Command, trained: tuple[Path, dict[str, float]], shards: str, tmp_path: Path, task: str
) -> None:
    words = [
        "eval",
        "--checkpoint",
        str(trained[0]),
        "--task",
        task,
        "--data",
        shards,
        "--batch-size",
        "16",
        "--which",
        "student",
    ]
    words += ["--train-data", shards]
    code, out, err = command(*words)
    assert code == 0, err
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *words, "--json", str(tmp_path / "e.json")],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=90)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said == [out, ""] and (tmp_path / "e.json").exists()


def test_processes_of_a_profile_find_the_same(
    command: Command, trained: tuple[Path, dict[str, float]], shards: str, tmp_path: Path
) -> None:
    """The nearest neighbours of rows that stay with the rank that has computed them."""
    words = ["eval", "--checkpoint", str(trained[0]), "--task", "knn", "--data", shards, "--train-data", shards]
    words += ["--max-train-samples", "30", "-k", "5", "--batch-size", "8", "--which", "student", "--json"]
    assert command(*words, f"{tmp_path}/one.json")[0] == 0
    assert command(*words, f"{tmp_path}/two.json", "profile.nproc=2")[0] == 0
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())


def test_a_killed_evaluation_goes_on(
    command: Command, trained: tuple[Path, dict[str, float]], shards: str, cache: Path
) -> None:
    words = (
        "eval",
        "--checkpoint",
        str(trained[0]),
        "--task",
        "retrieval",
        "--data",
        shards,
        "--which",
        "student",
        "--batch-size",
        "8",
    )
    killed = """
import os, signal
from cosmos_ssl.models.encoder import ModelEncoder
encode, calls = ModelEncoder.match_image, []
def counted(self, pixels):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, pixels)
ModelEncoder.match_image = counted
"""
    done = subprocess.run([sys.executable, "-c", killed + RUN, *words], capture_output=True, text=True)
    assert done.returncode == -9
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.pt")}
    assert len(kept) == 3
    code, out, err = command(*words)
    assert code == 0 and not list(cache.rglob("*")), err
    assert command(*words)[1] == out


def test_coco_and_what_is_missing_of_it(
    command: Command, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(3)]
    notes = [{"image_id": n, "caption": f"a circle, number {n}, {k}"} for n in range(3) for k in range(5)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2017.json").write_text(json.dumps({"images": images, "annotations": notes}))
    (tmp_path / "val2017").mkdir()
    for n in range(2):
        Image.new("RGB", (40, 32), (100 * n, 0, 0)).save(tmp_path / f"val2017/{n}.jpg")
    words = ("eval", "--checkpoint", str(trained[0]), "--task", "retrieval", "--data", str(tmp_path))
    code, _, err = command(*words)
    assert code == 2 and err == (
        f"data: 1 of 3 pictures are not in {tmp_path / 'val2017'} (2.jpg). Go on without them: --allow-missing\n"
    )
    assert command(*words, "--allow-missing")[0] == 0
    (tmp_path / "val2017/2.jpg").write_bytes(b"no picture")
    code, _, err = command(*words)
    assert code == 2 and err.startswith("data: 1 of 3 pictures cannot be used (2.jpg: undecodable")


def test_a_released_name_is_reported_beside_the_published_figures(
    command: Command, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    (tmp_path / "cosmos_vitb32_cc3m").symlink_to(trained[0])
    (tmp_path / "flickr30k-images").mkdir()
    images = [{"filename": f"{n}.jpg", "split": "test", "sentences": [{"raw": f"text {n}"}]} for n in range(3)]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    for n in range(3):
        Image.new("RGB", (40, 32), (100 * n, 0, 0)).save(tmp_path / f"flickr30k-images/{n}.jpg")
    code, out, err = command(
        "eval", "--checkpoint", str(tmp_path / "cosmos_vitb32_cc3m"), "--task", "retrieval", "--data", str(tmp_path)
    )
    assert code == 0, err
    assert "| cosmos_vitb32_cc3m, published (the better of student and teacher) | 74.3 | 59.2 |" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "retreival"], "--task: no task named 'retreival'. Did you mean 'retrieval'? Tasks: retrieval"),
        (["--task", "retrieval", "--data", "nowhere/x.tar"], "data: nowhere/x.tar does not exist"),
        (["--task", "retrieval", "--json", "nowhere/x.json"], "--json nowhere/x.json: there is no folder nowhere"),
        (["--task", "retrieval", "--texts", "long"], "texts: samples such as "),
        (
            ["--task", "classification", "--templates", "foo"],
            "--templates: 'foo' has no {} for the class name. Give templates",
        ),
        (
            ["--task", "classification", "--class-names", "missing.txt"],
            "--class-names: missing.txt cannot be read: No such file",
        ),
        (
            ["--task", "classification", "--class-names", "{t}/one"],
            "--class-names: {t}/one holds 1, at least 2 are needed",
        ),
        (
            ["--task", "classification", "--class-names", "{t}/binary"],
            "--class-names: {t}/binary cannot be read: it is no text",
        ),
        (["--task", "classification", "--class-names", "{t}/pipe"], "--class-names: {t}/pipe is no regular file"),
        (["--task", "segmentation", "--templates", "foo"], "--templates: 'foo' has no {} for the class name"),
        (["--task", "segmentation", "--class-names", "{t}/pipe"], "--class-names: {t}/pipe is no regular file"),
        (["--task", "segmentation", "--class-names", "{t}/one"], "--class-names: val-0000000 has pixels of class "),
        (["--task", "retrieval", "--set", "coco"], "data: scenes is no folder, which the set 'coco' is read from"),
        (["--task", "mmvp", "--data", "{t}"], "data: {t}/Questions.csv is no regular file, where a text file is due"),
        (["--task", "winoground", "--data", "{t}"], "data: {t}/examples.jsonl cannot be read: it is no text"),
        (["--task", "sugarcrepe", "--allow-missing", "--data", "{t}"], "data: {t}/add_att.json is no JSON: "),
        (["--task", "knn", "--train-data", "{t}/numbered"], "0 of 31 labels are known: "),
    ],
)
def test_what_is_wrongly_given(
    command: Command,
    trained: tuple[Path, dict[str, float]],
    shards: str,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "one").write_text("cat\n")
    for name in ("binary", "examples.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0")
    for name in ("pipe", "Questions.csv"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "add_att.json").write_text("[" * 100_000)
    for n in range(2):
        (tmp_path / f"numbered/{n}").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / f"numbered/{n}/1.png")
    given = ["--data", shards] if words[1] in ("segmentation", "knn") else []
    code, out, err = command(
        "eval", "--checkpoint", str(trained[0]), *given, *(word.replace("{t}", str(tmp_path)) for word in words)
    )
    assert code == 2 and not out and message.replace("{t}", str(tmp_path)).replace("scenes", shards) in err, err


def test_checkpoints_that_cannot_be_used(command: Command, shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--task", "retrieval", "--data", shards)
    code, _, err = command("eval", "--checkpoint", "no/run", *words)
    assert code == 2 and "no/run is no run folder" in err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code, _, err = command("eval", "--checkpoint", "cosmos_vitb16_cc3m", *words)
    assert code == 2 and "cosmos_vitb16_cc3m is not in the cache and cannot be fetched" in err
    code, _, err = command("eval", "--checkpoint", str(GOLDEN), *words, "model.text.heads=2")
    assert code == 2 and "heads" in err


def test_roles_that_are_there(
    command: Command, trained: tuple[Path, dict[str, float]], shards: str, tmp_path: Path
) -> None:
    content = torch.load(GOLDEN, weights_only=True)
    torch.save({"student": content["student"]}, tmp_path / "student.pt")
    words = (
        "eval",
        "--checkpoint",
        str(tmp_path / "student.pt"),
        "--task",
        "knn",
        "--data",
        shards,
        "--train-data",
        shards,
    )
    heads = ("model.image.heads=3", "model.text.heads=2")
    code, out, err = command(*words, *heads)
    assert code == 0 and out.splitlines()[0].split() == ["METRIC", "STUDENT"], err
    code, _, err = command(*words, *heads, "--which", "both")
    assert code == 2 and "student.pt holds the student alone" in err
    code, _, err = command(*words, *heads, "--which", "teacher")
    assert code == 2 and "holds no teacher" in err


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets: six pictures of Flickr30k, two examples of Winoground, and a broken MMVP."""
    root = tmp_path_factory.mktemp("sets")
    for folder in ("flickr30k/flickr30k-images", "winoground/images", "mmvp/MLLM_VLM Images", "unknown"):
        (root / folder).mkdir(parents=True)
    images = [
        {"filename": f"{n}.jpg", "split": "test", "sentences": [{"raw": f"text {k} of {n}"} for k in range(2)]}
        for n in range(6)
    ]
    (root / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    rows = [{f"image_{i}": f"{n}_{i}" for i in (0, 1)} | {"caption_0": "a on b", "caption_1": "b on a"} for n in (0, 1)]
    (root / "winoground/examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "mmvp/Questions.csv").write_text("Question ID,Type,Statement\n1,Colour,a red ball\n")
    for n in range(6):
        Image.new("RGB", (32, 32), (40 * n, 9, 200 - 40 * n)).save(root / f"flickr30k/flickr30k-images/{n}.jpg")
    for name in ("0_0", "0_1", "1_0", "1_1"):
        Image.new("RGB", (32, 32), (99 * int(name[0]), 9, 99 * int(name[2]))).save(
            root / f"winoground/images/{name}.png"
        )
    return root


def test_all_that_is_there_in_one_table(
    command: Command, trained: tuple[Path, dict[str, float]], several: Path, tmp_path: Path, cache: Path
) -> None:
    run, file = str(trained[0]), tmp_path / "all.json"
    code, out, err = command("eval", "--checkpoint", run, "--task", "all", "--data", str(several), "--json", str(file))
    assert code == 0, err
    report = json.loads(file.read_text())
    assert [(one["task"], one["set"]) for one in report["reports"]] == [
        ("retrieval", "flickr30k"),
        ("winoground", "winoground"),
    ]
    alone = cosmos_ssl.evaluate(run, "retrieval", several / "flickr30k")
    assert report["reports"][0]["metrics"] == alone["metrics"]
    name = "image_to_text_R@1"
    assert report["metrics"][f"teacher/retrieval/flickr30k/{name}"] == alone["metrics"][f"teacher/{name}"]
    head, first = out.splitlines()[:2]
    assert head.split()[:3] == ["TASK", "SET", "METRIC"] and head.endswith("COSMOS B/16  OpenCLIP B/16  SigLIP B/16")
    assert first.split()[:3] == ["retrieval", "flickr30k", name] and first.split()[-3:] == ["92.9", "86.3", "89.1"]
    assert "left out: mmvp: data: " in out and "1 statements are no pairs" in out
    assert not list(cache.iterdir())
    with pytest.raises(UserError, match="--class-names: an option of single tasks"):
        cosmos_ssl.evaluate(run, "all", several, class_names="imagenet")
    for data, told in ((None, "--data: name the folder"), (several / "unknown", "holds a set that is known")):
        with pytest.raises(CosmosError, match=told):
            cosmos_ssl.evaluate(run, "all", data)


def test_models_side_by_side(
    command: Command, trained: tuple[Path, dict[str, float]], several: Path, tmp_path: Path
) -> None:
    """A model beside itself differs by nothing, pair by pair; one that saw other samples is not paired with it."""
    run, data, file = str(trained[0]), str(several / "flickr30k"), tmp_path / "both.json"
    code, out, err = command(
        *(
            "eval",
            "--task",
            "retrieval",
            "--data",
            data,
            "--which",
            "student",
            "--json",
            str(file),
            "--compare",
            run,
            run,
        )
    )
    assert code == 0, err
    report = json.loads(file.read_text())
    rows = {(row["metric"], row["model"]): row for row in report["comparison"]}
    first, second = (row for (metric, _), row in rows.items() if metric == "image_to_text_R@5")
    assert first["difference"] is None and first["interval"][0] <= first["value"] <= first["interval"][1]
    assert (
        first["set"] == "flickr30k"
        and second["difference"] == 0
        and second["difference_interval"] == [0, 0]
        and second["paired"]
    )
    assert first["value"] == report["metrics"]["student/image_to_text_R@5"] and report["others"][0]["samples"] == 6
    assert out.splitlines()[0].startswith("TASK") and "0.00 to 0.00" in out
    code, _, err = command("eval", "--task", "retrieval", "--data", data)
    assert code == 2 and "--checkpoint: name what to evaluate" in err
