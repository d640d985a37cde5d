"""The notebook in ``docs/`` runs from its first cell to its last, shortened, and is kept without outputs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "quickstart.ipynb"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that hold code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs() -> None:
    cells = code_cells(json.loads(NOTEBOOK.read_text()))
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert [cell["metadata"].get("tags") for cell in cells[:2]] == [["parameters"], None]


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    short = {"output": "out", "train_samples": 256, "validation_samples": 32}
    monkeypatch.setenv("COSMOS_NOTEBOOK", json.dumps(short))
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    assert KernelSpecManager().get_kernel_spec("python3")  # that of this environment
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    cells = code_cells(notebook)
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 3, "matches, attention, and attention for two texts"
    [found] = [output["data"]["text/plain"] for output in cells[-3]["outputs"]]
    assert found.count("(") == 5, "five scenes with their scores"
    assert (tmp_path / "out" / "attention" / "index.html").is_file()
