"""``cosmos-ssl flops``: tables, JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]

SMALL = """
extends: methods/{method}.yaml
name: {name}
model:
  embed_dim: 32
  image: {{type: clip_vit, width: 64, layers: {layers}, patch_size: 8, image_size: 32}}
  text: {{type: clip_text, width: 64, layers: 1, heads: 1}}
"""
COSMOS = "augmenters: {image: {global_crops_size: 32, local_crops_size: 16}}\n"


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    """Files of a small CLIP, a deeper one and a COSMOS."""
    texts = {
        "clip": SMALL.format(method="clip", name="clip", layers=1) + "augmenters: {image: {size: 32}}\n",
        "deeper": SMALL.format(method="clip", name="deeper", layers=3) + "augmenters: {image: {size: 32}}\n",
        "cosmos": SMALL.format(method="cosmos", name="cosmos", layers=1) + COSMOS,
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return [str(tmp_path / f"{name}.yaml") for name in texts]


def rows(out: str, title: str) -> dict[str, list[str]]:
    """The rows of the table with this title: name -> cells."""
    lines = out.split(f"\n{title}  ")[1].split("\n\n")[0].splitlines()[1:]
    return {line.rsplit("  ")[0].rstrip(): line.split() for line in lines}


def test_side_by_side(command: Command, configs: list[str], tmp_path: Path) -> None:
    code, out, err = command(
        "flops", *configs, "--caption-tokens", "9", "--depth", "3", "--json", str(tmp_path / "x.json")
    )
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "x.json").read_text())
    costs = report["configs"]
    assert [cost["name"] for cost in costs] == ["clip", "deeper", "cosmos"] and [
        cost["config"] for cost in costs
    ] == configs
    assert report["samples"] == 2 and report["caption_tokens"] == 9 and "multiply-add" in report["convention"]
    keys = {"config", "name", "flops", "parameters", "activations", "modules", "uncounted", "difference"}
    assert all(cost.keys() == keys and not cost["uncounted"] for cost in costs)

    total = next(line for line in out.splitlines() if line.startswith("total")).split()[1:]
    first, *others = (cost["flops"]["total"] for cost in costs)
    expected = [first / 1e9, *(x for other in others for x in (other / 1e9, other / first))]
    assert [float(cell) for cell in total] == pytest.approx(expected, rel=1e-3)
    heads = next(line for line in out.splitlines() if line.startswith("GFLOP")).split()
    assert heads == ["GFLOP", "clip", "deeper", "ratio", "cosmos", "ratio"]

    modules = out.split("MODULE, FORWARD GFLOP")[1]
    names = [line.split()[0] for line in modules.splitlines()[1:] if line and not line.startswith("Not")]
    blocks = [name for name in names if name.startswith("image.blocks.")]
    assert blocks == ["image.blocks.0", "image.blocks.1", "image.blocks.2"]
    assert (
        names.index("teacher")
        > names.index("losses.distill")
        > names.index("losses.clip")
        > names.index("text.blocks.0")
    )
    assert next(line for line in modules.splitlines() if line.startswith("image.blocks.2")).split()[1] == "0"
    assert "Not counted in cosmos: nothing" in out


def test_one_config(command: Command, configs: list[str], tmp_path: Path) -> None:
    code, out, _ = command("flops", configs[2], "--depth", "1", "--samples", "3", "--json", str(tmp_path / "x.json"))
    (cost,) = json.loads((tmp_path / "x.json").read_text())["configs"]
    assert code == 0 and "Per sample of a step of 3" in out and "ratio" not in out
    names = [
        "student",
        "image",
        "text",
        "heads",
        "losses",
        "teacher",
        "teacher.image",
        "teacher.text",
        "teacher.heads",
    ]
    assert [module["name"] for module in cost["modules"]] == names
    table = out.split("KEPT (MIB)\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in table.splitlines()] == names
    student = [float(cell) for cell in table.splitlines()[0].split()[1:]]
    module = cost["modules"][0]
    assert student == pytest.approx(
        [module["flops"] / 1e9, module["parameters"] / 1e6, module["activations"] / 2**20], rel=1e-3
    )


def test_overrides_reach_all_and_one_name_twice_is_told_apart(command: Command, configs: list[str]) -> None:
    code, out, _ = command("flops", configs[0], configs[1], "model.image.layers=2", "name=same")
    lines = out.splitlines()
    assert code == 0 and configs[0] in out and configs[1] in out
    assert next(line for line in lines if line.startswith("total")).split()[3] == "1.000"


def test_on_a_card(command: Command, configs: list[str], tmp_path: Path) -> None:
    """Told by stage, as one of 64 ranks; what a run takes is known where its length is."""
    argv = ["--card", "h100", "--samples", "8", "--ranks", "64", "--json", str(tmp_path / "x.json")]
    code, out, err = command("flops", configs[2], *argv, "schedule.max_steps=2000", "training.batch_size=1024")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["name"], found["precision"], found["ranks"]) == ("cosmos", "amp_bf16", 64)
    for key in ("launches", "gigabytes", "teraflops"):
        assert found[key] == pytest.approx(sum(stage[key] for stage in found["stages"].values()))
    assert found["launches"] > 500 and found["step_ms"] >= found["host_ms"] > 0
    assert found["samples_per_s"] == pytest.approx(8e3 / found["step_ms"])
    assert found["mfu"] == pytest.approx(found["teraflops"] / 989 / found["step_ms"] * 1e3)
    assert found["hours"] == pytest.approx(2000 * 1024 / (64 * found["samples_per_s"]) / 3600)
    assert found["gpu_hours"] == pytest.approx(64 * found["hours"])
    assert found["host_waits"] == sum(place["count"] for place in found["waits"])
    assert found["pageable_copies"] == sum(place["count"] for place in found["copies"])
    total = next(line for line in out.splitlines() if line.startswith("total")).split()[1:]
    assert total[0] == f"{found['launches']:,}" and float(total[4]) == pytest.approx(found["step_ms"], rel=1e-3)
    assert "rank 3 of 64" in out and "all 2,048,000 samples" in out and "Times are estimates" in out


def test_a_fault_in_the_other_process_is_told_as_ever(command: Command) -> None:
    code, out, err = command("flops", "methods/clip", "--card", "h100", "losses.clip.temprature=1")
    assert (code, out) == (2, "") and "losses.clip.temprature: unknown option of Clip" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["methods/clip", "losses.clip.type=clap"], "no loss named 'clap'. Did you mean 'clip'?"),
        (["methods/clip", "losses.clip.temprature=1"], "temprature"),
        (["methods/dino", "model.image.width=-1"], "model.image.width"),
        (["methods/clip", "--samples", "0"], "0 is no whole number from 1"),
        (["methods/clip", "--depth", "x"], "x is no whole number from 0"),
        (["methods/clip", "--card", "h1"], "'h1' (choose from"),
        (["methods/clip", "--card", "h100", "--ranks", "0"], "0 is no whole number from 1"),
        (["methods/clip", "--card", "h100", "--device", "cpu"], "leave --device out"),
        (["methods/clip", "--ranks", "2"], "--ranks needs --card"),
    ],
)
def test_what_is_refused(command: Command, argv: list[str], message: str) -> None:
    code, out, err = command("flops", *argv)
    assert (code, out) == (2, "") and message in err


def test_captions_that_cannot_be(command: Command, configs: list[str]) -> None:
    code, _, err = command("flops", configs[0], "--caption-tokens", "200")
    assert code == 2 and err == "--caption-tokens: 200 is not between 3 and the context length of 77\n"


def test_a_fault_of_the_last_config_is_said_first(command: Command, configs: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("extends: methods/clip.yaml\nlosses: {clip: {temprature: 1}}\n")
    code, out, err = command("flops", configs[0], str(tmp_path / "bad.yaml"))
    assert code == 2 and not out and "temprature" in err


def test_help_needs_no_torch() -> None:
    code = """
import sys
from cosmos_ssl.cli import main
try:
    main(["flops", "--help"])
except SystemExit as left:
    assert left.code == 0
sys.exit("torch" in sys.modules or "fvcore" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--caption-tokens" in done.stdout
