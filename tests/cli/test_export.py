"""``cosmos-ssl export``: an official file, a run folder, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import cosmos_ssl
from cosmos_ssl.build import Builder
from cosmos_ssl.cli import main
from cosmos_ssl.config import load_config
from cosmos_ssl.config.source import dump_yaml
from cosmos_ssl.engine.checkpoint import Snapshot, save_checkpoint, to_host
from cosmos_ssl.errors import UserError

Command = Callable[..., tuple[int, str, str]]

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "official_checkpoint.pt"
HEADS = ["model.image.heads=3", "model.text.heads=2"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of quickstart's model, with two checkpoints and the results of the last."""
    folder = tmp_path / "run"
    folder.mkdir()
    loaded = load_config(
        "quickstart", ["name=mine", "model.image.layers=1", "model.text.layers=1", "data=null", "evaluators=null"]
    )
    model = Builder(loaded).assemble("measure").model
    (folder / "config.yaml").write_text(dump_yaml(loaded.config.model_dump()))
    for step in (1, 2):
        student = to_host(model.state_dict())
        teacher = {name: value + step for name, value in student.items()}
        save_checkpoint(
            folder, Snapshot(step=step, tensors={"student": student, "teacher": teacher}, state={"step": step})
        )
    rows = [{"step": step, "loss": 3.0 / step, "retrieval/student/image_to_text_R@1": step / 8} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    metrics = {"retrieval/student/image_to_text_R@1": 0.25, "retrieval/teacher/image_to_text_R@1": 0.5}
    (folder / "result.json").write_text(json.dumps({"step": 2, "metrics": metrics}))
    return folder


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from cosmos_ssl.cli import main\ntry: main(['export', '--help'])\nfinally: assert "
        "'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--checkpoint C" in done.stdout and "--output DIR" in done.stdout and "model.text.heads=4" in done.stdout


def test_a_golden_file_as_openclip(command: Command, tmp_path: Path) -> None:
    """The features are those that the official program recorded."""
    import open_clip
    from safetensors.torch import load_file

    flags = ["--format", "openclip", "--which", "teacher", "--output", str(tmp_path / "out")]
    code, out, err = command("export", "--checkpoint", str(GOLDEN), *flags, *HEADS)
    assert (code, err) == (0, "")
    assert out == f"{tmp_path}/out: the teacher of {GOLDEN} for openclip\nleft out: heads.cross, losses.distill\n"
    recorded = load_file(GOLDEN.with_name("golden.safetensors"))
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}/out")
    with torch.no_grad():
        images = model.encode_image(torch.cat([recorded["image.0"], recorded["image.1"]]), normalize=True)
    torch.testing.assert_close(images, recorded["teacher.image_features"], atol=1e-5, rtol=0)


def test_the_card_of_a_run_has_its_recipe_and_its_curves(command: Command, run: Path, tmp_path: Path) -> None:
    """The recipe reads back as a config, without this machine's folders."""
    flags = ["--format", "timm", "--output", str(tmp_path / "out")]
    assert command("export", "--checkpoint", str(run), *flags)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    found = re.search(r"^```yaml\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert found is not None and "output_dir" not in found[1] and str(tmp_path) not in card
    (tmp_path / "again.yaml").write_text(found[1])
    told, known = (load_config(path).config for path in (tmp_path / "again.yaml", run / "config.yaml"))
    assert told.model == known.model and told.losses == known.losses
    assert "(curves.png)" in card
    with Image.open(tmp_path / "out" / "curves.png") as curves:
        assert curves.size == (1280, 260)  # a panel of losses, one of retrieval
    command("export", "--checkpoint", str(run / "checkpoints" / "step_00000001"), *flags[:3], str(tmp_path / "first"))
    assert not (tmp_path / "first" / "curves.png").exists()  # one row is no curve


def test_in_python(run: Path, tmp_path: Path) -> None:
    """The function is what the command calls, and takes a model that is in memory, too."""
    roles, notes = cosmos_ssl.export(run, "official", tmp_path / "out")
    assert roles == ("student", "teacher") and notes == []
    assert cosmos_ssl.export(cosmos_ssl.load(run, "teacher"), "timm", tmp_path / "timm", which="teacher").roles == (
        "teacher",
    )
    with pytest.raises(UserError, match="--format onnxx: give one of openclip"):
        cosmos_ssl.export(run, "onnxx", tmp_path / "no")


def test_a_run_folder_as_official_has_both_roles(command: Command, run: Path, tmp_path: Path) -> None:
    code, out, _ = command(
        "export", "--checkpoint", str(run), "--format", "official", "--output", str(tmp_path / "out")
    )
    assert code == 0 and out.startswith(f"{tmp_path}/out: the student and the teacher of {run} for official\n")
    content = torch.load(tmp_path / "out" / "mine.pt", weights_only=True)
    assert content.keys() == {"name", "cosmos_ssl.sizes", "student", "teacher"} and content["name"] == "mine"
    assert torch.equal(
        content["teacher"]["logit_scale"], content["student"]["logit_scale"] + 2
    )  # of the newest checkpoint
    card = (tmp_path / "out" / "README.md").read_text()
    assert "student/image_to_text_R@1 | 0.25 |" in card and "teacher/image_to_text_R@1 | 0.5 |" in card
    again = cosmos_ssl.load(tmp_path / "out" / "mine.pt", "teacher")
    assert (again.model.image.blocks[0].attn.heads, again.model.text.blocks[0].attn.heads) == (2, 4)
    assert torch.equal(again.model.state_dict()["image.class_token"], content["teacher"]["visual.class_embedding"])


def test_results_belong_to_the_last_checkpoint(command: Command, run: Path, tmp_path: Path) -> None:
    for step, there in ((1, False), (2, True)):
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        code, _, _ = command(
            "export", "--checkpoint", str(checkpoint), "--format", "timm", "--output", str(tmp_path / f"{step}")
        )
        assert code == 0 and ("## Results" in (tmp_path / f"{step}" / "README.md").read_text()) == there


def test_a_damaged_checkpoint_is_passed_over(command: Command, run: Path, tmp_path: Path) -> None:
    """The one before is exported, without the results of the last."""
    (run / "checkpoints" / "step_00000002" / "teacher.safetensors").write_bytes(b"")
    flags = ["--format", "official", "--which", "teacher", "--output", str(tmp_path / "out")]
    assert command("export", "--checkpoint", str(run), *flags)[0] == 0
    teacher = torch.load(tmp_path / "out" / "mine.pt", weights_only=True)["teacher"]
    student = cosmos_ssl.load(run / "checkpoints" / "step_00000001").model.state_dict()
    assert torch.equal(teacher["logit_scale"], student["losses.clip.logit_scale"] + 1)
    assert "## Results" not in (tmp_path / "out" / "README.md").read_text()


def test_what_is_told_of_a_load_and_of_the_licence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was passed over and what was taken on standard error, also where one that is named is damaged."""
    damaged = run / "checkpoints" / "step_00000002"
    flags = ["--format", "timm", "--license", "cc-by-nc-4.0", "--output", str(tmp_path / "out")]
    (damaged / "state.json").write_text("{}")
    assert main(["export", "--checkpoint", str(damaged), *flags]) == 2
    assert capsys.readouterr().err == f"{damaged} is damaged: state.json has 2 bytes, expected 29\n"
    assert main(["export", "--checkpoint", str(run), *flags]) == 0
    passed, taken = capsys.readouterr().err.splitlines()
    assert passed.startswith(f"warning: {damaged} is damaged (state.json has 2 bytes, expected 29) and is passed over")
    assert re.fullmatch(rf"the student of {run}/checkpoints/step_00000001: (\d+) of \1 tensors", taken)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n") and "`mine, step 1`" in card and str(tmp_path) not in card
    with pytest.raises(SystemExit):
        main(["export", "--checkpoint", str(run), *flags[:2], "--license", "My Own: \n x", *flags[4:]])
    assert "is no identifier of a licence on the hub, such as mit" in capsys.readouterr().err


def test_an_openclip_folder_comes_back(command: Command, run: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert command("export", "--checkpoint", str(run), "--format", "openclip", "--output", str(there))[0] == 0
    assert command("export", "--checkpoint", str(there), "--format", "openclip", "--output", str(back))[0] == 0
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        assert (there / name).read_bytes() == (back / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", str(GOLDEN), "--format", "openclip"], "say model.image.heads=.. and model.text.heads=.."),
        (["--checkpoint", "nowhere", "--format", "timm"], "nowhere is no run folder with a checkpoint"),
        (["--checkpoint", str(GOLDEN), "--format", "onnxx"], "invalid choice: 'onnxx'"),
    ],
)
def test_mistakes(command: Command, tmp_path: Path, flags: list[str], message: str) -> None:
    code, out, err = command("export", *flags, "--output", str(tmp_path / "out"))
    assert code == 2 and not out and message in err and "Traceback" not in err and not (tmp_path / "out").exists()
