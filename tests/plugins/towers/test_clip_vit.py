"""CLIP's image tower: recorded values, packing, options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import GroupPlan, ImageGroup, Spec, UserError
from cosmos_ssl.config import OptimizerConfig
from cosmos_ssl.engine.optim import trained
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.transformer import lay_out
from cosmos_ssl.testing import check_tower
from cosmos_ssl_plugins.towers.clip_text import ClipText
from cosmos_ssl_plugins.towers.clip_vit import ClipViT

Towers = Callable[..., tuple[ClipViT, ClipText]]
SMALL: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "patch_size": 4, "image_size": 16}


def group(pixels: Tensor, masks: Tensor | None = None) -> ImageGroup:
    return ImageGroup(pixels=pixels, params=pixels.new_zeros(*pixels.shape[:2], 0), masks=masks)


def small(**options: Any) -> ClipViT:
    torch.manual_seed(0)
    return ClipViT(Spec(embed_dim=8), **SMALL | options).double()


def random_groups(masked: bool = False) -> dict[str, ImageGroup]:
    g = torch.Generator().manual_seed(1)
    masks = torch.rand(2, 3, 16, generator=g) < 0.4 if masked else None
    return {
        "global": group(torch.randn(2, 3, 3, 16, 16, generator=g, dtype=torch.float64), masks),
        "local": group(torch.randn(4, 3, 3, 8, 12, generator=g, dtype=torch.float64)),
    }


def plain(vit: ClipViT, pixels: Tensor, masks: Tensor | None = None) -> Tensor:
    """A straight vision transformer with this tower's weights, a size at a time: [n, 3, H, W] -> [n, P + N, W]."""
    x = F.conv2d(pixels, vit.patch_embed.weight, vit.patch_embed.bias, stride=vit.spec.patch_size)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    if masks is not None:
        x = torch.where(masks[..., None], vit.mask_token, x)
    table = vit.position_embedding
    grid = table[1:].T.reshape(1, -1, vit.grid, vit.grid)
    if (rows, columns) != (vit.grid, vit.grid):
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / vit.grid, (columns + 0.1) / vit.grid), mode="bicubic")
    x = x + grid.flatten(2).transpose(1, 2)
    first = (vit.class_token + table[0]).expand(len(x), 1, -1)
    registers = [] if vit.register_tokens is None else [vit.register_tokens.expand(len(x), -1, -1)]
    return plain_blocks(vit, vit.norm_pre(torch.cat([first, *registers, x], 1)))


def plain_blocks(vit: ClipViT, x: Tensor) -> Tensor:
    """The blocks and the final norm, one image like the other: [n, T, W] -> [n, T, W]."""
    for block in vit.blocks:
        y = block.norm1(x)
        attn = block.attn
        y, _ = F.multi_head_attention_forward(
            y.transpose(0, 1),
            y.transpose(0, 1),
            y.transpose(0, 1),
            y.shape[-1],
            attn.heads,
            attn.qkv.weight,
            attn.qkv.bias,
            None,
            None,
            False,
            0.0,
            attn.proj.weight,
            attn.proj.bias,
            need_weights=False,
        )
        x = x + block.ls1(y.transpose(0, 1))
        x = x + block.ls2(block.mlp.fc2(ACTIVATIONS[vit.kind["activation"]](block.mlp.fc1(block.norm2(x)))))
    return x


def pool(vit: ClipViT, x: Tensor) -> Tensor:
    """Rows [V, n, P + N, W] as they leave the blocks -> pooled features [V, n, W]."""
    if vit.kind["pooling"] == "class":
        return vit.norm(x)[:, :, 0]
    patches = x[:, :, vit.prefix :]
    return vit.norm(patches.mean(2)) if vit.kind["norm_after_pool"] else vit.norm(patches).mean(2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_student_features_are_the_recorded_ones(
    golden: dict[str, Tensor], official_towers: Towers, backend: str
) -> None:
    vit, _ = official_towers("student", backend)
    pixels = [golden[f"image.{i}"] for i in range(8)]
    groups = {"global": group(torch.stack(pixels[:2])), "local": group(torch.stack(pixels[2:]))}
    features = vit(groups, {"global": GroupPlan(views=(0, 1)), "local": GroupPlan(views=tuple(range(6)))})
    found = torch.cat([features[name].unit for name in ("global", "local")]).flatten(0, 1)
    torch.testing.assert_close(found, golden["student.image_features"], atol=1e-5, rtol=0)


def test_teacher_features_are_the_recorded_ones(golden: dict[str, Tensor], official_towers: Towers) -> None:
    vit, _ = official_towers("teacher")
    groups = {"global": group(torch.stack([golden["image.0"], golden["image.1"]]))}
    features = vit(groups, {"global": GroupPlan(views=(0, 1))})
    torch.testing.assert_close(
        features["global"].unit.flatten(0, 1), golden["teacher.image_features"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("csa", [False, True])
@pytest.mark.parametrize("size", ["32x32", "32x40", "48x32"])
def test_dense_features_are_the_recorded_ones(
    golden: dict[str, Tensor], official_towers: Towers, size: str, csa: bool
) -> None:
    vit, _ = official_towers("teacher")
    tokens, pooled = vit.dense(golden[f"dense.{size}.image"], csa=csa)
    for name, found in (("tokens", tokens), ("pooled", pooled)):
        torch.testing.assert_close(
            found @ vit.projection, golden[f"dense.{size}.{name}.csa{int(csa)}"], atol=1e-5, rtol=0
        )


OPTIONS = [
    {},
    {"registers": 2, "layer_scale": 0.3, "pre_norm": False},
    {"grad_checkpointing": True},
    {"layers": 1},
    {"activation": "quick_gelu", "norm_eps": 0.1, "patch_bias": True, "pooling": "mean"},
    {"activation": "gelu_tanh", "pooling": "mean", "norm_after_pool": True, "registers": 1, "grad_checkpointing": True},
]
ACTIVATIONS: dict[Any, Any] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_and_pruned_is_a_plain_transformer_of_each_size(options: dict[str, Any]) -> None:
    vit = small(**options)
    groups = random_groups()
    plan = {"global": GroupPlan(views=(0, 1), tokens=(1,)), "local": GroupPlan(views=(3, 1))}
    features = vit(groups, plan)
    glob, local = (
        plain(vit, groups[name].pixels[list(plan[name].views)].flatten(0, 1)).unflatten(0, (2, 3)) for name in plan
    )
    expected = [pool(vit, glob), vit.norm(glob[1:, :, vit.prefix :]), pool(vit, local)]
    found = [features["global"].pooled, features["global"].tokens, features["local"].pooled]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    torch.testing.assert_close(features["local"].projected, expected[2] @ vit.projection)
    assert features["global"].token_views == (1,)
    assert features["local"].tokens is None

    weights = [torch.randn_like(x) for x in expected]
    parameters = {n: p for n, p in vit.named_parameters() if n != "projection"}
    sums = [sum((x * w).sum() for x, w in zip(xs, weights, strict=True)) for xs in (found, expected)]
    gradients = [torch.autograd.grad(total, list(parameters.values())) for total in sums]
    for name, a, b in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_patches_left_out_in_training() -> None:
    """What is pooled is a transformer over the class token, registers and the patches that were drawn."""
    vit, groups = small(registers=2, patch_dropout=0.7), random_groups()
    plan = {"global": GroupPlan(views=(1,)), "local": GroupPlan(views=(0, 2))}
    torch.manual_seed(5)
    found = vit(groups, plan)
    torch.manual_seed(5)
    for name, wanted in plan.items():
        rows = vit._embed(groups[name].pixels[list(wanted.views)].flatten(0, 1), None)
        patches = rows.shape[1] - 3
        drawn = torch.rand(len(rows), patches).argsort(1, descending=True)[:, : round(0.3 * patches)]
        for image, kept, pooled in zip(rows, drawn, found[name].pooled.flatten(0, 1), strict=True):
            x = vit.norm_pre(torch.cat([image[:3], image[3:][kept.sort().values]]))
            alone = vit.blocks(x, lay_out(np.array([len(x)]), np.ones(len(x), bool)))
            torch.testing.assert_close(pooled, vit.norm(alone)[0], atol=1e-10, rtol=0)
    whole = vit.eval()(groups, plan)
    torch.testing.assert_close(whole["local"].pooled, small(registers=2)(groups, plan)["local"].pooled, atol=0, rtol=0)
    assert vit.unread(plan) == ()
    with pytest.raises(UserError, match=r"patch_dropout: patches of the views 'global' are read"):
        vit.unread({"global": GroupPlan(views=(0, 1), tokens=(1,))})
    with pytest.raises(ValueError, match="patch_dropout: 1 is no share below 1"):
        small(patch_dropout=1)


@pytest.mark.parametrize("tokens", [(), (0,)])
def test_masked_patches(tokens: tuple[int, ...]) -> None:
    vit = small(mask_token=True)
    nn.init.normal_(vit.mask_token)
    groups = random_groups(masked=True)
    masks = groups["global"].masks
    hidden = GroupPlan(views=(0, 1), tokens=tokens, hide_masked=True, masked_tokens=True)
    features = vit(groups, {"global": hidden, "local": GroupPlan(views=(0,), projected=False)})
    pixels = groups["global"].pixels.flatten(0, 1)
    expected = vit.norm(plain(vit, pixels, masks.flatten(0, 1)))
    torch.testing.assert_close(
        features["global"].masked_tokens, expected[:, 1:].unflatten(0, (2, 3))[masks], atol=1e-10, rtol=0
    )
    torch.testing.assert_close(features["global"].pooled, expected[:, 0].unflatten(0, (2, 3)), atol=1e-10, rtol=0)
    # the teacher's side of the same: nothing hidden, the same places read, one view alone
    features = vit(groups, {"global": GroupPlan(views=(1,), masked_tokens=True)})
    expected = vit.norm(plain(vit, pixels))[:, 1:].unflatten(0, (2, 3))[1:]
    torch.testing.assert_close(features["global"].masked_tokens, expected[masks[1:]], atol=1e-10, rtol=0)


@pytest.mark.parametrize("registers", [0, 2])
def test_patches_that_are_left_out_are_not_encoded(registers: int) -> None:
    """Each picture is a plain transformer of its visible patches; the whole group beside it stays what it is."""
    vit = small(registers=registers)
    groups = random_groups(masked=True)
    masks, pixels = groups["global"].masks, groups["global"].pixels
    plan = {
        "global": GroupPlan(views=(0, 1), tokens=(0,)),
        "seen": GroupPlan(views=(1, 0), tokens=(0,), drop_masked=True),
    }
    rows: list[int] = []
    vit.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    features = vit({**groups, "seen": groups["global"]}, plan)
    assert rows == [2 * 6 * (1 + registers) + 6 * 16 + int((~masks).sum())]
    alone = vit(groups, {"global": plan["global"]})["global"]
    torch.testing.assert_close(features["global"].tokens, alone.tokens, atol=1e-10, rtol=0)
    assert not features["seen"].tokens[0, masks[0]].any()
    for sample in range(3):
        for place, view in enumerate((1, 0)):
            x = vit._embed(pixels[view, sample][None], None)
            keep = torch.cat([torch.ones(vit.prefix, dtype=torch.bool), ~masks[view, sample]])
            y = vit.norm(plain_blocks(vit, vit.norm_pre(x[:, keep])))
            torch.testing.assert_close(features["seen"].pooled[place, sample], y[0, 0], atol=1e-10, rtol=0)
            if view == 0:
                seen = features["seen"].tokens[0, sample, ~masks[0, sample]]
                torch.testing.assert_close(seen, y[0, vit.prefix :], atol=1e-10, rtol=0)


def test_last_block_computes_only_what_is_read() -> None:
    vit = small()
    seen = []
    for block in vit.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    vit(random_groups(), {"global": GroupPlan(views=(0, 1), tokens=(1,)), "local": GroupPlan(views=(0, 1))})
    assert seen == [6 * 17 + 6 * 7, 3 + 3 * 17 + 6]


def test_options_are_off_by_default() -> None:
    vit = small()
    assert not [n for n, _ in vit.named_parameters() if "ls" in n or "mask" in n or "register" in n]
    assert isinstance(vit.norm_pre, nn.LayerNorm)
    plan = {"local": GroupPlan(views=(0, 1))}
    first, again = (vit.train()(random_groups(), plan)["local"].pooled for _ in range(2))
    assert torch.equal(first, again)
    assert vit.capabilities == {"tokens", "csa", "drop"}
    assert "masks" in small(mask_token=True).capabilities


def test_drop_path_leaves_out_whole_samples_in_training_alone() -> None:
    assert [block.drop_path for block in small(drop_path=0.4, drop_path_uniform=True).blocks] == [0.4, 0.4]
    vit = small(layers=1, drop_path=0.5, pre_norm=False)
    assert vit.blocks[0].drop_path == 0
    vit.blocks[0].drop_path = 0.5
    pixels = torch.randn(1, 1, 3, 16, 16, dtype=torch.float64).expand(1, 64, -1, -1, -1)
    plan = {"global": GroupPlan(views=(0,), tokens=(0,))}
    still = vit.eval()({"global": group(pixels)}, plan)["global"].tokens[0]
    moving = vit.train()({"global": group(pixels)}, plan)["global"].tokens[0]
    assert len(torch.unique(still.round(decimals=8), dim=0)) == 1
    assert len(torch.unique(moving.round(decimals=8), dim=0)) == 4  # two branches, kept or not


def test_start_values() -> None:
    torch.manual_seed(0)
    vit = ClipViT(Spec(embed_dim=64), width=128, layers=1, patch_size=16, image_size=224)
    bound = math.sqrt(6 / (128 + 3 * 128))  # xavier_uniform over the whole [3W, W]
    attn = vit.blocks[0].attn
    assert attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert attn.proj.weight.abs().max().item() == pytest.approx(128**-0.5, rel=1e-3)
    assert not attn.qkv.bias.any()
    assert not attn.proj.bias.any()
    assert vit.blocks[0].mlp.fc1.bias.any()
    for parameter in (vit.class_token, vit.position_embedding, vit.projection):
        assert parameter.std().item() == pytest.approx(128**-0.5, rel=0.2)


def test_sincos_positions_are_fixed() -> None:
    """They are timm's, except for the order of features, and load and interpolate as learned ones do."""
    vit, learned = small(positions="sincos"), small()
    table = build_sincos2d_pos_embed([4, 4], 32, dtype=torch.float64).view(16, 2, 2, 8).transpose(1, 2).flatten(1)
    torch.testing.assert_close(vit.position_embedding, F.pad(table, (0, 0, 1, 0)), atol=1e-6, rtol=0)
    parameters = {f"image.{name}" for name, _ in vit.named_parameters()}
    assert parameters - trained(Model({"image": vit}, {}, {}), OptimizerConfig()).keys() == {"image.position_embedding"}
    check_tower("clip_vit", **SMALL, positions="sincos")
    learned.load_state_dict(vit.state_dict())
    pixels = random_groups()["local"].pixels[0]
    torch.testing.assert_close(vit.dense(pixels), learned.dense(pixels), atol=0, rtol=0)


def test_what_a_plan_leaves_unread() -> None:
    vit = small(mask_token=True)
    assert set(vit.unread({"global": GroupPlan(views=(0,), projected=False)})) == {"projection", "mask_token"}
    assert vit.unread({"global": GroupPlan(views=(0,), hide_masked=True)}) == ()
    assert small().unread({"global": GroupPlan(views=(0,))}) == ()
    assert vit({}, {}) == {}


def test_depths() -> None:
    vit = small()
    depths = {name: vit.layer_of(name) for name, _ in vit.named_parameters()}
    assert {depths[n] for n in ("class_token", "position_embedding", "patch_embed.weight", "norm_pre.bias")} == {0}
    assert depths["blocks.1.mlp.fc1.weight"] == 2
    assert depths["norm.weight"] == depths["projection"] == vit.layer_count == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: 3 heads cannot share a width of 32"),
        ({"heads": None}, "heads: must be given"),
        ({"width": 30, "positions": "sincos"}, "positions: sincos needs a width that is a multiple of 4, not 30"),
        ({"layers": 0}, "layers: 0 is not above zero"),
        ({"image_size": 3}, "image_size: 3 is smaller than a patch of 4"),
        ({"drop_path": 1.0}, "drop_path: 1 is no share below 1"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_half_precision_inference_mode_and_micro_batches() -> None:
    vit = small().float()
    groups = {name: group(g.pixels.float()) for name, g in random_groups().items()}
    plan = {"global": GroupPlan(views=(0, 1), tokens=(0,)), "local": GroupPlan(views=(0, 1, 2, 3))}
    exact = vit(groups, plan)
    with torch.inference_mode():
        assert torch.equal(vit(groups, plan)["local"].pooled, exact["local"].pooled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = vit(groups, plan)
    torch.testing.assert_close(rough["local"].pooled.float(), exact["local"].pooled, atol=0.1, rtol=0.1)
    rough["global"].projected.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in vit.parameters())
    part = vit({name: group(g.pixels[:, 1:3]) for name, g in groups.items()}, plan)
    torch.testing.assert_close(part["global"].tokens, exact["global"].tokens[:, 1:3], atol=1e-5, rtol=0)


def test_sizes_that_are_no_whole_number_of_patches_are_cropped() -> None:
    vit = small()
    pixels = torch.randn(1, 3, 19, 14, dtype=torch.float64)
    tokens, _ = vit.dense(pixels)
    assert tokens.shape == (1, 4 * 3, 32)
    torch.testing.assert_close(tokens, vit.dense(pixels[..., :16, :12])[0])
