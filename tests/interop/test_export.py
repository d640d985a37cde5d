"""What all exports share: the official form, the folder, the card."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import cosmos_ssl
from cosmos_ssl.errors import CheckpointError, UserError
from cosmos_ssl.interop.export import export
from cosmos_ssl.interop.foreign import foreign_roles, read_foreign
from cosmos_ssl.interop.forms import FORMS, PROGRAMS
from cosmos_ssl.interop.model_card import Origin

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "official_checkpoint.pt"
HEADS = ["model.image.heads=3", "model.text.heads=2"]
COSMOS = [
    *("model.embed_dim=32", "heads={cross: {type: cross_attention}}", "teacher={type: ema}"),
    "losses.distill={type: cross_modality_distillation, head: cross}",
]
ORIGIN = Origin(name="small", checkpoint="runs/small")

WEIGHTS = [form for form in FORMS if form not in PROGRAMS]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("roles", [("student", "teacher"), ("teacher",)])
def test_an_official_file_keeps_every_bit(folder, roles):
    models = {role: cosmos_ssl.load(GOLDEN, role, overrides=HEADS) for role in roles}
    assert export(models, "official", folder, Origin(name="golden", checkpoint=str(GOLDEN))) == []
    found, recorded = torch.load(folder / "golden.pt", weights_only=True), torch.load(GOLDEN, weights_only=True)
    assert found.keys() == {"name", "cosmos_ssl.sizes", *roles} and found["name"] == "golden"
    for role in roles:
        expected = {name.removeprefix("module."): value for name, value in recorded[role].items()}
        assert found[role].keys() == expected.keys()
        assert all(torch.equal(found[role][name], value) for name, value in expected.items())
    assert foreign_roles(folder / "golden.pt") == roles


def test_a_model_of_ours_in_the_official_form(make, folder, pixels, words):
    encoder = make(*COSMOS)
    export({"student": encoder}, "official", folder, ORIGIN)
    again = cosmos_ssl.load(folder / "small.pt")  # which tells its heads
    assert torch.equal(again.encode_image(pixels(encoder)), encoder.encode_image(pixels(encoder)))
    assert torch.equal(again.encode_text(words(encoder)), encoder.encode_text(words(encoder)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.image.registers=2"], r"has no place for model.image.registers \(2\)"),
        (
            ["model.image.layer_scale=0.1", "model.image.pre_norm=false"],
            "model.image.pre_norm=false; model.image.layer_scale",
        ),
        (["model.image.mask_token=true"], "model.image.mask_token"),
        (
            ["heads.cross.num_heads=4", "heads.cross.mask_padding=true"],
            r"num_heads=4 \(it has 8\); heads.cross.mask_padding=true",
        ),
        (["losses.koleo={type: koleo}", "heads.other={type: projection}"], "no place for heads.other"),
        (["losses.distill=null"], "a whole COSMOS model, and this one lacks distill_logit_scale"),
    ],
)
def test_what_the_official_form_cannot_hold(make, folder, overrides, message):
    with pytest.raises(UserError, match=message):
        export({"student": make(*COSMOS, *overrides)}, "official", folder, ORIGIN)
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize("form", WEIGHTS)
def test_the_lines_of_the_card_load_the_folder(make, form, folder, monkeypatch):
    """No override is needed, and nothing of this machine stands there."""
    origin = Origin(
        name="small", checkpoint="/far/away/small", metrics={"loss": 1.0}, licence="mit" if form == "timm" else "other"
    )
    export({"teacher": make(*COSMOS, "model.background=teal")}, form, folder, origin)
    card = (folder / "README.md").read_text()
    lines, opening = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    monkeypatch.chdir(folder)
    exec(lines, names)
    assert "model" in names and "transparent pictures on teal" in card
    assert form != "official" or names["model"].spec.background == "teal"
    monkeypatch.chdir(folder.parent)
    Image.new("LA", (3, 2), 0).save("picture.png")
    exec(opening, names)
    assert names["picture"].mode == "RGB" and names["picture"].getpixel((0, 0)) == (0, 128, 128)
    assert "from the teacher of `small`" in card and "Apache-2.0" in card and "## Results" not in card
    assert "far/" not in card and str(folder.parent) not in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == origin.licence and ("license_name" in header) == (form != "timm")


@pytest.mark.parametrize("form", WEIGHTS)
def test_files_are_for_whom_the_umask_says(make, form, folder):
    encoder, old = make(*COSMOS), os.umask(0o027)
    try:
        export({"teacher": encoder}, form, folder, ORIGIN)
    finally:
        os.umask(old)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o640"}
    assert folder.stat().st_mode & 0o777 == 0o750


def test_the_card_has_the_results_of_its_role(make, folder):
    metrics = {
        "retrieval/student/image_to_text_R@1": 0.25,
        "retrieval/teacher/image_to_text_R@1": 0.5,
        "loss": 3.0,
        "loss/clip": 2.0,
    }
    export({"student": make()}, "openclip", folder, Origin(name="small", checkpoint="runs/small", metrics=metrics))
    card = (folder / "README.md").read_text()
    assert "| retrieval/student/image_to_text_R@1 | 0.25 |" in card and "teacher" not in card and "loss" not in card
    assert "from the student of `small`" in card and "| text | 32 | 2 | 2 | 16 of 49,408 tokens |" in card


def test_folders_in_use_are_left_alone(make, folder):
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"is not empty. Give another folder"):
        export({"student": make()}, "timm", folder, ORIGIN)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match=r"mine.txt is not empty"):
        export({"student": make()}, "timm", folder / "mine.txt", ORIGIN)
    with pytest.raises(UserError, match="cannot be written: "):
        export({"student": make()}, "timm", folder / "mine.txt" / "out", ORIGIN)


def test_an_empty_folder_is_filled(make, folder):
    folder.mkdir()
    export({"student": make()}, "timm", folder, ORIGIN)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_what_is_no_model_of_another_program(tmp_path):
    assert read_foreign(tmp_path, "student") is None and foreign_roles(tmp_path) is None
    assert read_foreign("runs/nowhere", "student") is None and foreign_roles("runs/nowhere") is None
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="neither student nor teacher, but state_dict"):
        read_foreign(tmp_path / "x.pt", "student")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"x.safetensors cannot be read"):
        read_foreign(tmp_path / "x.safetensors", "student")


def test_released_names_are_fetched(monkeypatch):
    monkeypatch.setattr("cosmos_ssl.interop.hub.fetch_released", lambda name: GOLDEN)
    assert foreign_roles("cosmos_vitb16_cc3m") == ("student", "teacher")
    found, known = read_foreign("cosmos_vitb16_cc3m", "teacher"), read_foreign(GOLDEN, "teacher")
    assert torch.equal(found.state["image.projection"], known.state["image.projection"])
    with pytest.raises(CheckpointError, match="Did you mean 'cosmos_vitb16_cc3m'"):
        read_foreign("cosmos_vitb16_cc4m", "teacher")
