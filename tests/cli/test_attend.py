"""``cosmos-ssl attend``: the pictures and the page of a trained run, and what it says of input that it cannot use."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import cosmos_ssl
from cosmos_ssl.errors import UserError
from cosmos_ssl.evaluation.attending import pair
from cosmos_ssl.evaluation.attention_maps import attention_maps
from cosmos_ssl.evaluation.classification import SIMPLE_TEMPLATES
from cosmos_ssl.evaluation.pictures import class_colours, overlay
from cosmos_ssl.models.encoder import resize_crop

Command = Callable[..., tuple[int, str, str]]
TINY = {
    "extends": "quickstart",
    "model": {"image": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 2}, "embed_dim": 32},
    "data": {"train_samples": 16, "validation_samples": 8},
    "loader": {"workers": 0},
    "schedule": {"max_steps": 1, "warmup_steps": 1},
    "training": {"batch_size": 8},
    "evaluators": None,
    "logging": {"tensorboard": False},
}


def train(folder: Path, *overrides: str) -> str:
    """The folder of a run of one step."""
    config = folder / "tiny.yaml"
    config.write_text(json.dumps(TINY))
    cosmos_ssl.train(config, [f"output_dir={folder}/run", f"data.folder={folder}/scenes", *overrides])
    return str(folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train(tmp_path_factory.mktemp("attend"))


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Two pictures of noise, neither of them square."""
    paths = [tmp_path / "a dog.png", tmp_path / "cat.jpg"]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (80 + number, 100, 3), np.uint8)).save(path)
    return [str(path) for path in paths]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pictures_and_page(command: Command, run: str, images: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    code, said, err = command(
        "attend",
        "--checkpoint",
        run,
        "--image",
        *images,
        "--text",
        "a dog",
        "--text",
        "<b>cat</b>",
        "--output",
        str(out),
    )
    assert (code, said, err) == (0, f"{out}/index.html\n", "")
    assert names(out) == [
        "001_a_dog_patches.png",
        "001_a_dog_words.png",
        "002_cat_patches.png",
        "002_cat_words.png",
        "grid.png",
        "index.html",
    ]
    model = cosmos_ssl.load(run)
    with Image.open(images[1]) as image:
        maps = attention_maps(model, model.preprocess(image)[None], ["<b>cat</b>"])
        shown = resize_crop(image, 448)
    assert maps is not None
    expected = overlay(shown, maps[0].patches)
    drawn = torch.from_numpy(np.array(Image.open(out / "002_cat_patches.png"))).permute(2, 0, 1)
    assert (drawn.int() - expected.int()).abs().max() <= 1
    page = (out / "index.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["All pairs", "a dog", "&lt;b&gt;cat&lt;/b&gt;"]
    assert page.count("<img ") == 5 and not re.search(r"(src|href)=\"(?!data:)", page)
    assert "step_00000001" in page and "student" in page


def test_the_teacher_looks_elsewhere(command: Command, run: str, images: list[str], tmp_path: Path) -> None:
    for which in ("student", "teacher"):
        arguments = ("--checkpoint", run, "--which", which, "--image", images[0], "--text", "a red circle")
        assert command("attend", *arguments, "--output", str(tmp_path / which))[0] == 0
        assert names(tmp_path / which) == ["001_a_dog_patches.png", "001_a_dog_words.png", "grid.png", "index.html"]
    student, teacher = ((tmp_path / which / "001_a_dog_patches.png").read_bytes() for which in ("student", "teacher"))
    assert student != teacher


def test_all_pairs(command: Command, run: str, images: list[str], tmp_path: Path) -> None:
    texts = [word for text in ("a", "b", "c") for word in ("--text", text)]
    base = ("attend", "--checkpoint", run, "--image", *images, *texts, "--output", str(tmp_path / "out"))
    code, _, err = command(*base)
    assert (code, err) == (2, "--text: 3 texts for 2 pictures. Give one for each, one for all, or --all-pairs\n")
    assert not (tmp_path / "out").exists()
    assert command(*base, "--all-pairs")[0] == 0
    assert len([name for name in names(tmp_path / "out") if name.endswith("patches.png")]) == 6


def test_pair() -> None:
    assert pair(2, 2) == [(0, 0), (1, 1)]
    assert pair(1, 3) == [(0, 0), (0, 1), (0, 2)]
    assert pair(3, 1) == [(0, 0), (1, 0), (2, 0)]
    assert pair(2, 2, all_pairs=True) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(UserError, match="2 texts for 3 pictures"):
        pair(3, 2)


def test_segmentation(command: Command, run: str, images: list[str], tmp_path: Path) -> None:
    """Whole pictures, in windows: the class of each place is that of a plain loop over windows."""
    classes = ["red circle", "blue square", "sky"]
    out = tmp_path / "out"
    code, _, err = command(
        "attend", "--checkpoint", run, "--image", *images, "--segment", ", ".join(classes), "--output", str(out)
    )
    assert (code, err) == (0, "")
    assert names(out) == ["001_a_dog_segments.png", "002_cat_segments.png", "grid.png", "index.html"]
    model = cosmos_ssl.load(run)
    side = model.spec.image.image_size
    with Image.open(images[0]) as image:
        shown = torch.from_numpy(np.array(image.resize((560, 448)))).permute(2, 0, 1).float()
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    height, width = round(1.5 * side), round(1.5 * side * 100 / 80)
    pixels = F.interpolate(picture[None].float(), (height, width), mode="bilinear")[0].round() / 255
    pixels = (pixels - torch.tensor(model.spec.image.mean)[:, None, None]) / torch.tensor(model.spec.image.std)[
        :, None, None
    ]
    texts = (
        model.encode_text(model.tokenize([t.format(c) for c in classes for t in SIMPLE_TEMPLATES]))
        .unflatten(0, (3, -1))
        .mean(1)
    )
    total, count = torch.zeros(3, height, width), torch.zeros(height, width)
    for y in (0, side // 2):
        for x in (*range(0, width - side, side // 2), width - side):
            tokens = model.dense(pixels[None, :, y : y + side, x : x + side], csa=True)[0][0]
            cosines = (F.normalize(tokens, dim=-1) @ F.normalize(texts, dim=-1).T).T.unflatten(
                1, (side // model.spec.image.patch_size, -1)
            )
            total[:, y : y + side, x : x + side] += F.interpolate(cosines[None], (side, side), mode="bilinear")[0]
            count[y : y + side, x : x + side] += 1
    expected = F.interpolate((total / count)[None], (448, 560), mode="bilinear")[0].argmax(0)
    drawn = torch.from_numpy(np.array(Image.open(out / "001_a_dog_segments.png"))).permute(2, 0, 1).float()
    assert drawn.shape == (3, 448, 560) and len(expected.unique()) > 1
    # four tenths of the picture remain under the colour of a class
    under = (drawn - 0.4 * shown) / 0.6
    found = (under[:, :, :, None] - torch.tensor(class_colours(3)).float().T[:, None, None]).abs().amax(0).argmin(-1)
    assert (found == expected).float().mean() > 0.999  # borders lie where scores are equal
    page = (out / "index.html").read_text()
    shares = [int(share) for share in re.findall(r"\((\d+)%\)", page)]
    assert len(shares) == 6 and 98 <= sum(shares[:3]) <= 102
    assert abs(shares[0] - 100 * (expected == 0).float().mean()) < 2


def test_transparent_pictures_are_put_on_the_models_background(command: Command, run: str, tmp_path: Path) -> None:
    base = ("attend", "--checkpoint", run, "model.background=teal", "--text", "a", "--segment", "a,b")
    pictures = []
    for name, picture in (("clear", Image.new("RGBA", (60, 40), 0)), ("teal", Image.new("RGB", (60, 40), "teal"))):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "a.png")
        assert (
            command(*base, "--image", str(tmp_path / name / "a.png"), "--output", str(tmp_path / name / "out"))[0] == 0
        )
        found = ("001_a_patches.png", "001_a_segments.png")
        pictures.append([(tmp_path / name / "out" / each).read_bytes() for each in found])
    assert pictures[0] == pictures[1]


def test_in_python(command: Command, run: str, images: list[str], tmp_path: Path) -> None:
    """The function is what the command calls, and takes a model that is in memory, too."""
    words = (
        "attend",
        "--checkpoint",
        run,
        "--image",
        *images,
        "--text",
        "a dog",
        "--segment",
        "a,b",
        "--output",
        str(tmp_path / "a"),
    )
    assert command(*words)[0] == 0
    model = cosmos_ssl.load(run)
    page = cosmos_ssl.attend(model, images, "a dog", segment=["a", "b"], output=tmp_path / "b")
    assert page == tmp_path / "b" / "index.html" and names(tmp_path / "a") == names(tmp_path / "b")
    assert {"grid.png", "segments_grid.png"} < set(names(tmp_path / "a"))
    for path in (tmp_path / "a").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    with pytest.raises(UserError, match="--segment 'a': name at least two classes"):
        cosmos_ssl.attend(model, images, segment=["a"], output=tmp_path / "c")
    with torch.no_grad():
        next(iter(model.model.towers["image"].parameters())).fill_(torch.nan)
    for options in ({"texts": "a dog"}, {"segment": ["a", "b"]}):
        with pytest.raises(UserError, match="are not finite numbers"):
            cosmos_ssl.attend(model, images, output=tmp_path / "c", **options)


def test_models_without_such_heads(command: Command, images: list[str], tmp_path: Path) -> None:
    plain = train(tmp_path, "heads=null", "losses.distill=null", "teacher={type: none}")
    base = ("attend", "--checkpoint", plain, "--image", images[0], "--output", str(tmp_path / "out"))
    code, _, err = command(*base, "--text", "a")
    assert (
        code == 2 and err.count("\n") == 1 and "has no cross-attention head, so no text looks at a picture in it" in err
    )
    assert not (tmp_path / "out").exists()
    assert command(*base, "--segment", "a,b")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--image", "{a}"],
            "--text or --segment: give at least one text, or class names such as --segment 'cat,grass,sky'\n",
        ),
        (
            ["--image", "{a}", "--segment", "cat, "],
            "--segment 'cat, ': name at least two classes, such as 'cat,grass,sky'\n",
        ),
        (["--image", "{a}", "--text", "x", "--device", "abacus"], "--device abacus: "),
        (
            ["--image", "{t}/no.jpg", "{t}", "{t}/bad.jpg", "{t}/pipe.jpg", "--text", "x"],
            "--image {t}/no.jpg: there is no such file\n"
            "--image {t}: a folder; name picture files, such as {t}/*.jpg\n"
            "--image {t}/bad.jpg: no picture that can be read (cannot identify image file)\n"
            "--image {t}/pipe.jpg: no picture that can be read (no regular file)\n",
        ),
    ],
)
def test_bad_input(
    command: Command, run: str, images: list[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    os.mkfifo(tmp_path / "pipe.jpg")
    filled = [text.format(a=images[0], t=tmp_path) for text in arguments]
    code, _, err = command("attend", "--checkpoint", run, "--output", str(tmp_path / "out"), *filled)
    assert code == 2 and err.startswith(message.format(t=tmp_path)), err


def test_places_that_cannot_be_used(
    command: Command, run: str, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("attend", "--image", images[0], "--text", "x")
    code, _, err = command(*base, "--checkpoint", run, "--output", images[0])
    assert (code, err) == (2, f"--output {images[0]}: cannot be written: File exists\n")
    code, _, err = command(*base, "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out"))
    assert code == 2 and f"{tmp_path} is no run folder with a checkpoint" in err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = command(*base, "--checkpoint", run, "--output", str(tmp_path / "out"))
    assert (code, err) == (74, f"--output {tmp_path / 'out'}: cannot be written: No space left on device\n")
