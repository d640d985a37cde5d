"""Official checkpoints: both roles, both directions, sizes, and files that are something else."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

import cosmos_ssl
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.files import read_torch_file
from cosmos_ssl.interop.foreign import read_foreign
from cosmos_ssl.interop.official import NAMES, ROLES, to_official

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "official_checkpoint.pt"
HEADS = ["model.image.heads=3", "model.text.heads=2"]


@pytest.fixture(scope="module")
def content():
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture
def write(tmp_path, content):
    """Write a changed copy of the recorded file."""

    def write(**changes):
        path = tmp_path / "changed.pt"
        torch.save({key: value for key, value in {**content, **changes}.items() if value is not None}, path)
        return path

    return write


@pytest.mark.parametrize("role", ROLES)
def test_round_trip(content, role):
    expected = {name.removeprefix("module."): value for name, value in content[role].items()}
    found = to_official(read_foreign(GOLDEN, role).state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_roles_differ():
    student, teacher = (read_foreign(GOLDEN, role).state for role in ROLES)
    assert not torch.equal(student["image.projection"], teacher["image.projection"])


def test_every_name_has_one_counterpart():
    ours, theirs = zip(*NAMES, strict=True)
    assert len(set(ours)) == len(set(theirs)) == len(NAMES)


def test_names_are_those_of_openclip_and_21_more():
    """Against the model that the official program is built on, at its real size."""
    from open_clip import get_model_config
    from open_clip.model import CLIP

    config = get_model_config("ViT-B-16")
    with torch.device("meta"):
        known = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).state_dict()
    theirs = {name.replace("#", str(i)) for _, name in NAMES for i in range(12)}
    assert len(known) == 302
    assert known.keys() <= theirs
    assert len(theirs - known.keys()) == 21


def test_config_tells_the_sizes():
    config = read_foreign(GOLDEN, "student").config
    assert config["name"] == "golden"
    assert config["tokenizer"] == {"type": "clip", "context_length": 16}
    model = config["model"]
    assert model["embed_dim"] == 32
    assert {key: model["image"][key] for key in ("width", "layers", "patch_size", "image_size")} == {
        "width": 48,
        "layers": 2,
        "patch_size": 8,
        "image_size": 32,
    }
    assert {key: model["text"][key] for key in ("width", "layers", "vocab_size")} == {
        "width": 32,
        "layers": 2,
        "vocab_size": 256,
    }


def test_loads_into_an_encoder(content):
    encoder = cosmos_ssl.load(GOLDEN, "teacher", overrides=HEADS)
    state = encoder.model.state_dict()
    assert torch.equal(state["text.projection"], content["teacher"]["text_projection"])
    assert torch.equal(state["losses.distill.logit_scale"], content["teacher"]["distill_logit_scale"])
    assert encoder.encode_text(torch.randint(0, 256, (2, 16))).shape == (2, 32)


def test_heads_that_the_file_does_not_tell_are_asked_for():
    with pytest.raises(
        CheckpointError,
        match=r"its image tower \(width 48\) .* say model\.image\.heads=\.\. and model\.text\.heads=\.\.$",
    ):
        cosmos_ssl.load(GOLDEN)


def test_a_model_of_another_size_is_refused():
    with pytest.raises(CheckpointError, match=r"does not fit the model: image.blocks.2"):
        cosmos_ssl.load(GOLDEN, overrides=[*HEADS, "model.image.layers=3"])


def test_files_without_epoch_and_name(write):
    found = read_foreign(write(epoch=None, name=None), "teacher")
    assert len(found.state) == 83
    assert found.config["name"] == "changed"


def test_a_student_saved_without_data_parallelism(write, content):
    plain = {name.removeprefix("module."): value for name, value in content["student"].items()}
    assert read_foreign(write(student=plain), "student").state.keys() == read_foreign(GOLDEN, "student").state.keys()


def test_missing_role(write):
    with pytest.raises(CheckpointError, match="holds no teacher, only the student"):
        read_foreign(write(teacher=None), "teacher")
    with pytest.raises(CheckpointError, match="neither student nor teacher, but epoch, name, model"):
        read_foreign(write(student=None, teacher=None, model={}), "student")
    with pytest.raises(CheckpointError, match="its student is no table of tensors"):
        read_foreign(write(student={"a": 1}), "student")


def test_missing_and_unknown_tensors(write, content):
    student = {name: value for name, value in content["student"].items() if "ln_final" not in name}
    path = write(student={**student, "module.visual.extra": torch.ones(1)})
    message = (
        "no official COSMOS checkpoint: ln_final.weight is missing; ln_final.bias is missing; visual.extra "
        "is not one of its tensors"
    )
    with pytest.raises(CheckpointError, match=message):
        read_foreign(path, "student")
    found = read_foreign(path, "student", partial=True)
    assert found.missing == ("ln_final.weight", "ln_final.bias")
    assert found.unexpected == ("visual.extra",)
    assert len(found.state) == 81


def test_a_missing_block_is_noticed(write, content):
    student = {
        name: value for name, value in content["student"].items() if "visual.transformer.resblocks.0" not in name
    }
    with pytest.raises(CheckpointError, match=r"visual.transformer.resblocks.0.ln_1.weight is missing.*and 8 more"):
        read_foreign(write(student=student), "student")


def test_nothing_to_tell_the_sizes_from(write):
    with pytest.raises(CheckpointError, match="the sizes of the model cannot be told"):
        read_foreign(write(student={"logit_scale": torch.ones(())}), "student", partial=True)


class _Bomb:
    def __reduce__(self):
        return print, ("a pickle was executed",)


def test_pickles_are_not_executed(tmp_path, capsys):
    torch.save({"student": _Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_foreign(tmp_path / "bomb.pt", "student")
    assert not capsys.readouterr().out


def _zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello", "world")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"some text\n", GOLDEN.read_bytes()[:50_000], _zip()], ids=["empty", "text", "cut", "zip"]
)
def test_files_that_are_no_checkpoints(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x.pt") as found:
        read_foreign(tmp_path / "x.pt", "student")
    assert "\n" not in str(found.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_torch_file(tmp_path / "y.pt")


def test_a_bare_tensor(tmp_path):
    torch.save(torch.ones(2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor, not the table"):
        read_foreign(tmp_path / "x.pt", "student")


def test_what_the_official_form_cannot_hold():
    with pytest.raises(CheckpointError, match=r"no place for image.register_tokens"):
        to_official({"image.register_tokens": torch.ones(1), "image.class_token": torch.ones(1)})


def test_features_equal_openclip():
    """The tensors under OpenCLIP's names in OpenCLIP's own model: an independent reading of the same file."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    encoder = cosmos_ssl.load(GOLDEN, "student", overrides=HEADS)
    model = CLIP(
        32,
        CLIPVisionCfg(layers=2, width=48, head_width=16, patch_size=8, image_size=32),
        CLIPTextCfg(context_length=16, vocab_size=256, width=32, heads=2, layers=2),
    )
    theirs = to_official(encoder.model.state_dict())
    model.load_state_dict({name: theirs[name] for name in model.state_dict()})
    model.eval()
    pixels, tokens = torch.randn(3, 3, 32, 32), torch.randint(0, 255, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.encode_image(pixels), model.encode_image(pixels, normalize=True), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            encoder.encode_text(tokens), model.encode_text(tokens, normalize=True), atol=1e-6, rtol=0
        )
