"""What a step costs: the whole equals PyTorch's own count of a real step, stages and modules add up, nothing is left
out unsaid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cosmos_ssl.api import Head, Loss, LossOutput, Need, Progress, Spec, UserError
from cosmos_ssl.build import Builder
from cosmos_ssl.config import LoadedConfig, load_config
from cosmos_ssl.cost.step_cost import StepCost, kept_tensors, make_views, measure_step
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.engine.step import Gradients

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(
    path for folder in ("cosmos", "cosmos/ablations", "methods") for path in (CONFIGS / folder).glob("*.yaml")
)
SHRUNK: dict[str, dict[str, Any]] = {
    "clip_vit": {"width": 64, "layers": 2, "patch_size": 8, "image_size": 32},
    "clip_text": {"width": 64, "layers": 2, "heads": 1},
    "multi_crop": {"global_crops_size": 32, "local_crops_size": 16},
    "resize_crop": {"size": 32},
    "timm": {"model": "test_vit", "image_size": 32, "pretrained": False},
    "cross_attention": {"num_heads": 2},
    "projection": {"hidden_dim": 24, "output_dim": 32},
    "dino_projection": {"hidden_dim": 24, "bottleneck_dim": 12, "output_dim": 40},
    "dinov2_projection": {"hidden_dim": 24, "bottleneck_dim": 12, "output_dim": 40},
}


def small(source: Any, *overrides: str) -> LoadedConfig:
    """A config with small parts."""
    config = load_config(source).config
    parts = {f"model.{m}": getattr(config.model, m) for m in ("image", "text")}
    parts |= {
        "augmenters.image": config.augmenters.image,
        **{f"heads.{name}": head for name, head in config.heads.items()},
    }
    sizes = [
        f"{path}.{key}={value}"
        for path, part in parts.items()
        if part
        for key, value in SHRUNK.get(part.type, {}).items()
    ]
    groups = config.augmenters.image.options.get("groups", {}) if config.augmenters.image else {}
    sizes += [f"augmenters.image.groups.{name}.size=32" for name in groups]
    return load_config(source, ["evaluators=null", "model.embed_dim=32", "training.device=cpu", *sizes, *overrides])


def measure(loaded: LoadedConfig, **options: Any) -> StepCost:
    return measure_step(Builder(loaded).assemble("measure"), loaded.config, **options)


def flops_of_a_step(loaded: LoadedConfig, samples: int) -> int:
    """By PyTorch's counter around the step that trains, in one piece."""
    cpu = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    formulas = {
        cpu[0]: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        cpu[1]: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    assembly = Builder(loaded).assemble("measure")
    RunState(assembly, loaded.config, torch.device("cpu"))
    step, views = Gradients(assembly), make_views(assembly, samples)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step(views, Progress(step=0, total_steps=1))
    return int(counter.get_total_flops())


COSMOS = CONFIGS / "cosmos" / "vitb16_cc3m.yaml"
VARIANTS = {
    "as it is": [],
    "blocks computed again": ["model.image.grad_checkpointing=true", "model.text.grad_checkpointing=true"],
    "images frozen": ["optimizer.rules=[{match: 'image.*', frozen: true}]"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_total_is_that_of_the_step_that_trains(variant: str) -> None:
    loaded = small(COSMOS, *VARIANTS[variant])
    cost = measure(loaded, samples=3)
    assert round(cost.flops["total"] * 3) == flops_of_a_step(loaded, 3)
    assert not cost.uncounted and not cost.difference


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))
def test_nothing_of_a_recipe_is_uncounted(path: Path) -> None:
    loaded = small(path)
    cost = measure(loaded)
    assert not cost.uncounted and not cost.difference
    assert cost.flops["total"] == pytest.approx(sum(value for stage, value in cost.flops.items() if stage != "total"))
    # nothing goes back through a locked tower, and beside adapters no weight has a gradient
    least = 0.5 if path.stem in ("lit", "dino_txt", "lora_clip") else 1.5
    assert cost.flops["student_backward"] > least * cost.flops["student"] > 0
    assert (cost.flops["teacher"] > 0) == (cost.parameters["teacher"] > 0) == (
        loaded.config.teacher.type != "none"
    ) or "no_dist" in path.stem


def test_modules_add_up() -> None:
    cost = measure(small(COSMOS))
    modules = {module.name: module for module in cost.modules}
    assert [name for name in modules if "." not in name] == ["student", "image", "text", "heads", "losses", "teacher"]
    student = modules["student"]
    assert student.flops == pytest.approx(cost.flops["student"] + cost.flops["heads"] + cost.flops["losses"])
    for field in ("flops", "parameters", "activations"):
        parts = [getattr(modules[name], field) for name in ("image", "text", "heads", "losses")]
        assert (
            getattr(student, field) == pytest.approx(sum(parts)) or field == "activations"
        )  # the step itself keeps a few scalars
    assert (
        student.parameters == cost.parameters["trained"] == cost.parameters["teacher"] + modules["losses"].parameters
        and cost.parameters["frozen"] == 0
    )
    assert (
        student.activations
        == cost.activations
        > 0.99 * sum(modules[name].activations for name in ("image", "text", "heads"))
    )
    assert modules["teacher"].flops == cost.flops["teacher"] and modules["teacher"].activations == 0
    assert (
        modules["image.blocks.0"].flops > modules["image.blocks.1"].flops > 0
    )  # whose last block answers what is read alone


def test_parameters_are_told_apart() -> None:
    whole, frozen = measure(small(COSMOS)), measure(small(COSMOS, "optimizer.rules=[{match: 'image.*', frozen: true}]"))
    image = next(module.parameters for module in whole.modules if module.name == "image")
    assert frozen.parameters == {
        "trained": whole.parameters["trained"] - image,
        "frozen": image,
        "teacher": whole.parameters["teacher"],
    }
    assert (
        frozen.flops["student"] == whole.flops["student"]
        and frozen.flops["student_backward"] < whole.flops["student_backward"]
    )
    kept = [{module.name: module.activations for module in cost.modules} for cost in (whole, frozen)]
    assert kept[0]["image"] > 0 == kept[1]["image"] and kept[0]["text"] == kept[1]["text"]


def test_numbers_are_per_sample() -> None:
    """Towers alike but for padding in small calls of attention; the logits of a sample grow with the batch, step by
    step.
    """
    few, more, many = (measure(small(COSMOS), samples=n) for n in (2, 3, 4))
    for stage in ("student", "heads", "student_backward", "teacher"):
        assert few.flops[stage] == pytest.approx(many.flops[stage], rel=0.02)
    grown = [b.flops["losses"] - a.flops["losses"] for a, b in ((few, more), (more, many))]
    assert grown[0] == pytest.approx(grown[1]) and grown[0] > 0
    assert few.activations == pytest.approx(many.activations, rel=0.15)  # padded copies, large beside towers so small


def test_longer_captions_cost_more() -> None:
    text = [
        next(m.flops for m in measure(small(COSMOS), caption_tokens=n).modules if m.name == "text") for n in (10, 20)
    ]
    assert (
        1.2 < text[1] / text[0] < (77 + 7 * 20) / (77 + 7 * 10)
    )  # the first is read with its pads, by attention that grows faster


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_device_counts_alike(attention: str) -> None:
    """But for padding, which differs; activations are then those of the config's precision."""
    loaded = small(COSMOS, f"training.attention={attention}", "training.precision=amp_bf16")
    here, there = measure(loaded), measure(loaded, device=torch.device("cuda"))
    assert (
        there.flops["total"] == pytest.approx(here.flops["total"], rel=0.05)
        and not there.uncounted
        and not there.difference
    )
    assert there.parameters == here.parameters and there.activations < here.activations


# ---------------------------------------------------------------------------- made-up samples


@pytest.mark.parametrize("mean", [3, 9.5, 19.5, 70, 77])
def test_captions_have_the_mean_length(mean: float) -> None:
    assembly = Builder(small(COSMOS)).assemble("measure")
    views = make_views(assembly, 2, mean)
    lengths = torch.cat([group.lengths for group in views.text.values()])  # [views, samples]
    assert (
        lengths.double().mean() == mean
        and lengths.min() >= 3
        and lengths.max() <= 77
        and (lengths[:, 0] == lengths[:, 1]).all()
    )
    assert assembly.tokenizer is not None
    for group in views.text.values():
        assert torch.equal(assembly.tokenizer.lengths(group.tokens), group.lengths)
    assert {name: group.pixels.shape for name, group in views.image.items()} == {
        "global": (2, 2, 3, 32, 32),
        "local": (6, 2, 3, 16, 16),
    }


@pytest.mark.parametrize("mean", [2.9, 77.5])
def test_captions_that_cannot_be(mean: float) -> None:
    with pytest.raises(UserError, match=r"--caption-tokens: .* is not between 3 and the context length of 77"):
        make_views(Builder(small(COSMOS)).assemble("measure"), 2, mean)


def test_masks_are_the_augmenters() -> None:
    views = make_views(Builder(small(CONFIGS / "methods" / "ibot.yaml")).assemble("measure"), 8)
    masks = views.image["global"].masks
    assert (
        masks is not None
        and masks.shape == (2, 8, 16)
        and 0 < masks.sum() < masks.numel()
        and views.image["local"].masks is None
    )
    assert not views.text


# ---------------------------------------------------------------------------- memory


def test_kept_tensors_by_hand() -> None:
    """The first map keeps its input, the ReLU its output, which is the second map's input too; the sum of squares its
    input.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with kept_tensors(model) as kept:
        model(x).square().sum()
    assert kept == {"": 4 * (3 * 4 + 3 * 8 + 3 * 2), "0": 4 * 3 * 4, "1": 4 * 3 * 8}
    with kept_tensors(model) as kept, torch.no_grad():
        model(x)
    assert not kept
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------- heads that losses call


class Asked(Head):
    """Pools tokens by features that a loss gives."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        assert spec.image is not None
        self.key = nn.Linear(spec.image.width, spec.embed_dim)

    def outputs(self) -> dict[str, int]:
        return {}

    def requires(self, outputs: Any) -> list[Need]:
        return []

    def forward(self, features: Any, views: Any, outputs: Any) -> dict[str, Any]:
        return {}

    def respond(self, tokens: Any, texts: Any) -> dict[str, Any]:
        keys = self.key(tokens)  # [B, N, D]
        return {"pooled": torch.einsum("tbn,bnd->tbd", torch.einsum("td,bnd->tbn", texts, keys).softmax(-1), keys)}


class Asks(Loss):
    """Calls the head for each text."""

    calls_heads = True

    def __init__(self, spec: Spec) -> None:
        super().__init__()

    def requires(self) -> list[Need]:
        image = Need(modality="image", group="global", views=(0,), kind="tokens")
        return [Need(head="asked", outputs=()), image, Need(modality="text", group="global", views=(0,), gathered=True)]

    def forward(self, ctx: Any) -> LossOutput:
        texts = ctx.gathered["student"].stack("text")[0]
        return LossOutput(
            terms={
                "pooled": ctx.head("asked", ctx.student.image["global"].tokens_of((0,))[0], texts)["pooled"]
                .square()
                .mean()
            }
        )


def test_a_head_that_a_loss_calls_counts_with_the_loss() -> None:
    tree = {
        "extends": "base.yaml",
        "name": "asked",
        "model": {"image": {"type": "clip_vit"}, "text": {"type": "clip_text"}},
        "tokenizer": {"type": "clip"},
        "augmenters": {"image": {"type": "resize_crop"}, "text": {"type": "text_crop"}},
        "heads": {"asked": {"type": Asked}},
        "losses": {"asks": {"type": Asks}},
        "data": {"type": "scenes"},
    }
    loaded = small(tree)
    cost = measure(loaded)
    patches, width, dim = 16, 64, 32
    assert cost.flops["losses"] == 2 * (patches * width * dim + 2 * 2 * patches * dim)  # 2 texts ask each image
    assert cost.flops["heads"] == 0 and not cost.uncounted and not cost.difference
    assert round(2 * cost.flops["total"]) == flops_of_a_step(loaded, 2)
