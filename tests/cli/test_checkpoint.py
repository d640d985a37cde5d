"""``cosmos-ssl checkpoint``: one file a role of several."""

from pathlib import Path

import pytest
import torch

from cosmos_ssl.build.weights import find_source, read_weights, roles_of
from cosmos_ssl.cli import main
from cosmos_ssl.engine.checkpoint import Snapshot, find_fault, load_tensors, save_checkpoint, to_files
from cosmos_ssl.engine.layout import Split


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
