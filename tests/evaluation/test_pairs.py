"""MMVP-VLM, SugarCrepe and Winoground: small folders in their layouts, and verdicts worked out by hand."""

import json

import pytest
import torch
from PIL import Image

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.pairs import (
    SUGARCREPE,
    Example,
    Verdict,
    judge,
    pair_metrics,
    pair_outcomes,
    read_aro,
    read_mmvp,
    read_sugarcrepe,
    read_winoground,
)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


@pytest.fixture
def mmvp(tmp_path):
    lines = [
        "Question ID,Type,Statement",
        '1,Color and Appearance,"a red, round ball"',
        "2,Color and Appearance,a blue ball",
    ]
    lines += ["3,Quantity and Count,one dog", "4,Quantity and Count,two dogs"]
    (tmp_path / "Questions.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    for n in (1, 2):
        picture(tmp_path / f"MLLM_VLM Images/Color and Appearance/{n}.jpg")
        picture(tmp_path / f"MLLM_VLM Images/Quantity and Count/{n + 2}.jpg")
    return tmp_path


@pytest.fixture
def sugarcrepe(tmp_path):
    for name in SUGARCREPE:
        rows = {
            n: {"filename": f"{int(n):012d}.jpg", "caption": f"{name} {n}", "negative_caption": f"not {name} {n}"}
            for n in ("0", "7")
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    for n in (0, 7):
        picture(tmp_path / f"val2017/{n:012d}.jpg")
    return tmp_path


@pytest.fixture
def winoground(tmp_path):
    rows = [
        {
            "id": n,
            "image_0": f"ex_{n}_img_0",
            "image_1": f"ex_{n}_img_1",
            "caption_0": "a on b",
            "caption_1": "b on a",
            "tag": "x",
        }
        for n in range(2)
    ]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for n in range(2):
        for side in range(2):
            picture(tmp_path / f"images/ex_{n}_img_{side}.png")
    return tmp_path


def test_mmvp(mmvp):
    found = read_mmvp(mmvp).complete(Job())
    assert found.examples[0] == Example(
        ("Color and Appearance/1.jpg", "Color and Appearance/2.jpg"),
        ("a photo of a red, round ball", "a photo of a blue ball"),
        "Color and Appearance",
    )
    samples = found.samples()
    assert len(found.examples) == 2 and len(samples) == 4 and samples.read(3).decode().shape == (3, 6, 8)


def test_sugarcrepe(sugarcrepe):
    found = read_sugarcrepe(sugarcrepe, Job()).complete(Job())
    assert len(found.examples) == 14 and len(found.pictures) == 2
    assert found.examples[3] == Example(("000000000007.jpg",), ("add_obj 7", "not add_obj 7"), "add_obj")
    (sugarcrepe / "data").mkdir()
    for name in SUGARCREPE:
        (sugarcrepe / f"{name}.json").rename(sugarcrepe / f"data/{name}.json")
    assert read_sugarcrepe(sugarcrepe, Job()).examples == found.examples


@pytest.mark.parametrize("inner", ["", "data"])
def test_winoground(winoground, inner):
    if inner:
        (winoground / "data").mkdir()
        for name in ("examples.jsonl", "images"):
            (winoground / name).rename(winoground / "data" / name)
    found = read_winoground(winoground).complete(Job())
    assert found.examples[1] == Example(("ex_1_img_0.png", "ex_1_img_1.png"), ("a on b", "b on a"), "")


def test_missing_pictures(mmvp):
    (mmvp / "MLLM_VLM Images/Quantity and Count/4.jpg").unlink()
    found = read_mmvp(mmvp)
    with pytest.raises(DataError, match=r"1 of 4 pictures are not in .*Images \(Quantity and Count/4\.jpg\)"):
        found.complete(Job())
    assert [example.group for example in found.complete(Job(allow_missing=True)).examples] == ["Color and Appearance"]
    with pytest.raises(DataError, match="not one example"):
        found.without(set(found.pictures))


def test_missing_and_foreign_files(mmvp, tmp_path):
    (mmvp / "Questions.csv").write_text("ID,Type,Statement\n1,a,b\n2,a\n")
    with pytest.raises(DataError, match=r"Questions\.csv is not MMVP-VLM's form: line 3"):
        read_mmvp(mmvp)
    (mmvp / "Questions.csv").write_text("ID,Type,Statement\n1,a,b\n")
    with pytest.raises(DataError, match="1 statements are no pairs"):
        read_mmvp(mmvp)
    (mmvp / "Questions.csv").unlink()
    with pytest.raises(DataError, match=r"Questions\.csv cannot be read: No such file"):
        read_mmvp(mmvp)
    with pytest.raises(DataError, match=r"7 of 7 files are not in .* \(add_att\.json, "):
        read_sugarcrepe(tmp_path, Job())
    with pytest.raises(DataError, match=r"examples\.jsonl cannot be read"):
        read_winoground(tmp_path)
    (tmp_path / "examples.jsonl").write_text('{"image_0": "a"}\n')
    with pytest.raises(DataError, match=r"is not Winoground's form: KeyError 'image_1'"):
        read_winoground(tmp_path)
    (tmp_path / "add_att.json").write_text("[]")
    with pytest.raises(DataError, match=r"add_att\.json is not SugarCrepe's form"):
        read_sugarcrepe(tmp_path, Job(allow_missing=True))


@pytest.mark.parametrize(
    ("scores", "text", "image"),
    [
        ([[0.9, 0.1], [0.2, 0.8]], True, True),
        ([[0.9, 0.8], [0.1, 0.2]], True, False),  # the second text likes the first picture more
        ([[0.2, 0.1], [0.9, 0.8]], False, False),  # rows: 2 wrong; columns: 0 wrong
        ([[0.5, 0.1], [0.7, 0.8]], True, False),
        ([[0.5, 0.5], [0.1, 0.8]], False, True),  # equal scores are wrong
        ([[0.6, 0.5]], True, True),
        ([[0.5, 0.6]], False, True),
    ],
)
def test_verdicts(scores, text, image):
    assert judge(torch.tensor(scores)) == Verdict(text, image)


def test_metrics():
    examples = [Example(("a",), ("", ""), group) for group in ("x", "x", "x", "y")]
    verdicts = [Verdict(True, True), Verdict(True, False), Verdict(False, True), Verdict(False, False)]
    assert pair_metrics("winoground", examples, verdicts) == {
        "text_score": 0.5,
        "image_score": 0.5,
        "group_score": 0.25,
    }
    assert pair_metrics("sugarcrepe", examples, verdicts) == pytest.approx(
        {"accuracy": 1 / 3, "accuracy/x": 2 / 3, "accuracy/y": 0}
    )
    verdicts = [Verdict(False, True), Verdict(True, False), Verdict(True, False), Verdict(False, True)]
    assert pair_metrics("mmvp", examples, verdicts) == pytest.approx(
        {"accuracy": 2 / 3, "accuracy/x": 1 / 3, "accuracy/y": 1}
    )


def test_aro(tmp_path):
    """A picture is the part in its box; relations and pairs of attributes are groups of their own."""
    (tmp_path / "images").mkdir()
    whole = Image.new("RGB", (8, 6))
    whole.paste((250, 0, 0), (2, 1, 5, 3))
    whole.save(tmp_path / "images/1.png")
    row = {"image_path": "1.png", "bbox_x": 2, "bbox_y": 1, "bbox_w": 3, "bbox_h": 2, "true_caption": "a on b"}
    relation = {**row, "false_caption": "b on a", "relation_name": "on"}
    attribution = {**row, "false_caption": "the black red", "attributes": ["red", "black"]}
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps([relation, {**relation, "bbox_w": 2}]))
    with pytest.raises(DataError, match=r"visual_genome_attribution.json\)\. Go on without"):
        read_aro(tmp_path, Job())
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps([attribution]))
    found = read_aro(tmp_path, Job()).complete(Job())
    assert [example.group for example in found.examples] == ["relation/on", "relation/on", "attribution/red_black"]
    assert found.examples[0] == Example(("1.png#2,1,3,2",), ("a on b", "b on a"), "relation/on")
    cut = [found.samples().read(n).decode() for n in range(len(found.samples()))]
    assert [tuple(one.shape) for one in cut] == [(3, 2, 3), (3, 2, 2)] and cut[0][0].eq(250).all()
    (tmp_path / "visual_genome_attribution.json").write_text("[{}]")
    with pytest.raises(DataError, match="not ARO's form: KeyError 'bbox_x'"):
        read_aro(tmp_path, Job())


def test_aro_is_the_mean_over_relations_and_over_pairs_of_attributes_that_are_often_there():
    groups = ["relation/on"] * 3 + ["relation/in"] + ["attribution/a_b"] * 25 + ["attribution/c_d"] * 24
    examples = [Example(("p",), ("x", "y"), group) for group in groups]
    verdicts = [Verdict(n in (0, 3, 4, 5, 6, 7, 8), False) for n in range(len(examples))]
    wanted = {"accuracy/relation": (1 / 3 + 1) / 2, "accuracy/attribution": 5 / 25}
    assert pair_metrics("aro", examples, verdicts) == pytest.approx(wanted)
    drawn = torch.zeros(1, len(examples)).index_fill_(1, torch.tensor([0, 1, 4]), 1)
    assert pair_outcomes("aro", examples, verdicts)["accuracy/relation"].of(drawn).item() == 0.5
