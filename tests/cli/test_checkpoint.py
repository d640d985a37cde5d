"""``cosmos-ssl checkpoint``: one file a role of several. Paths of checkpoints and runs that are URLs."""

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosmos_ssl.build.weights import find_source, read_weights, roles_of
from cosmos_ssl.cli import main
from cosmos_ssl.engine.checkpoint import Snapshot, find_fault, load_tensors, save_checkpoint, to_files
from cosmos_ssl.engine.layout import Split
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl_launch import main as launch


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tensors and state in one file a role; every reader finds both forms, a callback's weights too."""
    weights = {f"image.{n}": torch.randn(4, n + 1) for n in range(5)}
    roles = {"student": weights, "teacher": weights, "average": weights, "optimizer": {"image.0.m": torch.ones(4, 1)}}
    tensors, files = to_files(roles, Split(3))
    run, output = tmp_path / "run", tmp_path / "merged"
    run.mkdir()
    (run / "config.yaml").write_text("name: x\n")
    (run / "id").write_text("1")
    folder = save_checkpoint(run, Snapshot(step=7, tensors=tensors, files=files, state={"step": 7, "epoch": 0.5}))
    assert main(["checkpoint", "merge", str(run), "--output", str(output)]) == 0
    merged = output / "checkpoints" / "step_00000007"
    assert capsys.readouterr().out == f"{merged}\n" and find_fault(merged) is None
    named = {f"{role}.safetensors" for role in roles} | {"state.json", "manifest.json"}
    assert {path.name for path in merged.iterdir()} == named
    assert (merged / "state.json").read_bytes() == (folder / "state.json").read_bytes()
    assert (output / "config.yaml").exists() and not (output / "id").exists()
    for checkpoint in (folder, merged):
        source = find_source(checkpoint)
        assert roles_of(source) == ("student", "teacher")
        for role, expected in roles.items():
            found = load_tensors(checkpoint, role) if role == "optimizer" else read_weights(source, role).state
            assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert main(["checkpoint", "merge", str(run), "--output", str(output)]) == 2
    assert "is there already, and not empty" in capsys.readouterr().err


URL = "s3://bucket//run/a"


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "--checkpoint", URL, "--task", "knn", "--data", "."],
        ["eval", "--compare", URL, URL, "--task", "knn", "--data", "."],
        ["embed", "--checkpoint", URL, "--data", ".", "--output", "o.npy"],
        ["attend", "--checkpoint", URL, "--image", "1.png", "--text", "x", "--output", "o"],
        ["search", "--checkpoint", URL, "--data", ".", "--text", "x", "--output", "o"],
        ["export", "--checkpoint", URL, "--format", "openclip", "--output", "o"],
        ["checkpoint", "merge", URL, "--output", "o"],
        ["checkpoint", "merge", "a", "--output", URL],
        ["runs", URL],
        ["cosmos-launch", "status", URL],
        ["cosmos-launch", "resume", URL],
        ["cosmos-launch", "cancel", URL],
        ["cosmos-launch", "--dry-run", "--config", "quickstart", "--fork", URL],
        ["cosmos-launch", "--dry-run", "--config", "quickstart", f"model.pretrained={URL}"],
        ["cosmos-launch", "--dry-run", "--config", "quickstart", f"teacher={{type: frozen, checkpoint: {URL}}}"],
        ["cosmos-launch", "--dry-run", "--config", "quickstart", f"output_dir={URL}"],
    ],
    ids=lambda argv: " ".join(word.split("=")[0] for word in argv if word != URL)[:60],
)
def test_a_url_is_shown_as_it_was_typed(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until checkpoints are read from remote storage, the message says what to do."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    monkeypatch.chdir(tmp_path)
    call = partial(launch, argv[1:]) if argv[0] == "cosmos-launch" else partial(main, argv)
    try:
        code = call()
    except SystemExit as error:  # of argparse
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and f"{URL} is a URL" in err and ("Copy it to a local" in err or "Set a local" in err), err
    assert not (tmp_path / "s3:").exists()


def test_a_url_in_a_path_object_keeps_its_slashes() -> None:
    with pytest.raises(CheckpointError, match=r"^s3://bucket/a is a URL"):
        find_source(Path("s3://bucket/a"))
