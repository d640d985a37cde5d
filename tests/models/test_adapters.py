"""Low-rank adapters: against their formula and peft's own merge, past no kernel, over runs, exports and mixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import cosmos_ssl
from cosmos_ssl.errors import CheckpointError, ConfigError
from cosmos_ssl.models import fused
from cosmos_ssl.models.adapters import add_adapters, merged, plain_name
from cosmos_ssl.models.transformer import Blocks, lay_out
from cosmos_ssl.testing import example_spec, small_run
from cosmos_ssl_plugins.towers.timm import TimmImage

LENGTHS = np.array([3, 5])
LORA: dict[str, Any] = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "match": ["*.attn.qkv", "image.*.fc?"]}


def adapted(match: list[str]) -> tuple[Blocks, Blocks]:
    """Blocks with adapters that have learned something, and plain ones with the merged weights."""
    torch.manual_seed(0)
    model, plain = Blocks(2, 32, 2), Blocks(2, 32, 2)
    own = {name: x.clone() for name, x in model.state_dict().items()}
    add_adapters({"image": model}, rank=2, alpha=4.0, match=match)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    found = merged(model.state_dict(), 4.0)
    assert found.keys() == own.keys() == {plain_name(name) for name, _ in model.named_parameters()}
    plain.load_state_dict(found)
    ends = tuple(f"{pattern.removeprefix('*')}.weight" for pattern in match)
    assert {name for name, x in own.items() if not torch.equal(x, found[name])} == {n for n in own if n.endswith(ends)}
    return model, plain


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("keep", [slice(None), [2, 7]], ids=["all rows", "last rows"])
@pytest.mark.parametrize("match", [["*.qkv"], ["*.proj"], ["*.fc1"], ["*.fc2"], ["*.qkv", "*.proj", "*.fc1", "*.fc2"]])
def test_blocks_compute_what_the_merged_weights_do(
    match: list[str], keep: Any, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels would read a weight past its adapter, they are not asked."""

    def norm_project(x, branch, bias, norm, linear, heads):  # type: ignore[no-untyped-def]
        total = x if branch is None else x + branch + (0 if bias is None else bias)
        return total, *F.linear(norm(total), linear.weight, linear.bias).view(len(x), 3, heads, -1).unbind(1)

    def add_norm(x, branch, bias, norm):  # type: ignore[no-untyped-def]
        total = x + branch + (0 if bias is None else bias)
        return total, norm(total)

    def norm_mlp(x, branch, bias, norm, inner, outer):  # type: ignore[no-untyped-def]
        total, normed = add_norm(x, branch, bias, norm)
        return total, F.gelu(F.linear(normed, inner.weight, inner.bias)) @ outer.weight.t()

    monkeypatch.setattr(fused, "usable", lambda x: kernels)
    for function in (norm_project, add_norm, norm_mlp):
        monkeypatch.setattr(fused, function.__name__, function)
    model, plain = adapted(match)
    x, read = torch.randn(8, 32), np.zeros(8, bool)
    read[keep] = True
    layout = lay_out(LENGTHS, read, backend="sdpa")
    torch.testing.assert_close(model(x, layout), plain(x, layout))
    model(x, layout).sum().backward()
    grads = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    assert grads == {name: "lora_" in name for name in grads}


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_is_what_peft_merges(rslora: bool) -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    config = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, target_modules=["first", "second"])
    model = peft.get_peft_model(Tower(), config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    state = {name.removeprefix("base_model.model."): x.clone() for name, x in model.state_dict().items()}
    theirs = model.merge_and_unload().state_dict()
    ours = merged(state, 7, rslora=rslora)
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^match\.1: '\*\.qvk' matches no linear map of a tower, such as image\.1\.ml"
    ):
        add_adapters({"image": Blocks(2, 32, 2)}, rank=2, alpha=1, match=["*.qkv", "*.qvk"])
    with pytest.raises(ValueError, match=r"^train\.0: 'projection' matches no parameter of a tower"):
        add_adapters({"image": Blocks(2, 32, 2)}, rank=2, alpha=1, match=["*.qkv"], train=["projection"])
    eva = TimmImage(example_spec(), model="eva02_tiny_patch14_224", image_size=28)
    with pytest.raises(
        ValueError, match=r"match: image\..*qkv cannot be adapted, since EvaAttention reads its weight pa"
    ):
        add_adapters({"image": eva}, rank=2, alpha=1, match=["*.qkv"])


def run(folder: Path, steps: int, **changes: Any) -> None:
    small_run(folder, {"model": {"lora": LORA}, **changes}, steps=steps)


def test_a_run_of_adapters(tmp_path: Path) -> None:
    """With a teacher, an average and a mix; over a restart; loaded, evaluated and exported it is a plain model."""
    callbacks = {
        "average": {"type": "weight_average", "decay": 0.5},
        "wise": {"type": "wise_ft", "alpha": 0.25, "evaluate": True},
    }
    changes: dict[str, Any] = {
        "callbacks": callbacks,
        "evaluators": {"retrieval": {"type": "retrieval", "every_epochs": None}, "classification": None},
        "checkpoints": {"every_steps": 2, "keep_last": 9, "every_minutes": None},
    }
    run(tmp_path, 4, **changes)
    folder = tmp_path / "run"
    told = (folder / "log.txt").read_text()
    states = {
        name: load_file(folder / f"checkpoints/step_00000004/{name}.safetensors") for name in ("student", "teacher")
    }
    mine = [name for name in states["student"] if "lora_" in name or name.startswith(("losses.", "heads."))]
    total, trained = (sum(states["student"][name].numel() for name in names) for names in (states["student"], mine))
    assert f"({total:,} parameters, {trained:,} of them trained)" in told
    first, last = (load_file(folder / f"checkpoints/step_0000000{n}/student.safetensors") for n in (2, 4))
    assert {name for name in first if not torch.equal(first[name], last[name])} <= set(mine)
    assert states["teacher"].keys() < states["student"].keys()

    loaded = {which: cosmos_ssl.load(folder, which).model.state_dict() for which in (*states, "average", "wise")}  # type: ignore[arg-type]
    assert not [name for state in loaded.values() for name in state if "lora" in name or "base_layer" in name]
    name = "image.blocks.0.attn.qkv"
    student = states["student"]
    change = 2 * student[f"{name}.lora_B.default.weight"] @ student[f"{name}.lora_A.default.weight"]
    base = student[f"{name}.base_layer.weight"]
    torch.testing.assert_close(loaded["student"][f"{name}.weight"], base + change)
    torch.testing.assert_close(loaded["wise"][f"{name}.weight"], base + 0.25 * change)
    result = json.loads((folder / "result.json").read_text())["metrics"]
    for which in (*states, "wise"):
        found = cosmos_ssl.evaluate(folder, "retrieval", which=which)["metrics"]  # type: ignore[arg-type]
        assert found == pytest.approx({key: result[f"retrieval/{key}"] for key in found}, abs=1e-4)
    cosmos_ssl.export(folder, "openclip", tmp_path / "exported")
    exported = cosmos_ssl.load(tmp_path / "exported").model.state_dict()
    assert torch.equal(exported[f"{name}.weight"], loaded["student"][f"{name}.weight"])

    kept = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text("model: 3")
    with pytest.raises(CheckpointError, match=r"config\.yaml does not tell of the adapters"):
        cosmos_ssl.load(folder)
    (folder / "config.yaml").write_text(kept)

    for path in (folder / "checkpoints/step_00000004", folder / "result.json"):
        path.rename(tmp_path / path.name)
    run(tmp_path, 4, **changes)
    for name in ("student", "teacher", "average", "wise"):
        before = load_file(tmp_path / f"step_00000004/{name}.safetensors")
        again = load_file(folder / f"checkpoints/step_00000004/{name}.safetensors")
        assert before.keys() == again.keys() and all(torch.equal(x, again[part]) for part, x in before.items())


def test_a_fault_is_at_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.match\.0: 'x' matches no linear map"):
        small_run(tmp_path, {"model": {"lora": {"match": ["x"]}}})
    monkeypatch.setattr("cosmos_ssl.build.builder.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"model\.lora: needs Hugging Face's peft\. Run: pip install 'cosmos-ssl\[lora\]'"
    ):
        small_run(tmp_path, {"model": {"lora": LORA}})
