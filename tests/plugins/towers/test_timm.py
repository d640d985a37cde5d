"""timm's vision transformers as towers, offline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from cosmos_ssl.api import GroupPlan, ImageGroup, Spec, UserError
from cosmos_ssl_plugins.towers.timm import TimmImage

SPEC = Spec(embed_dim=8)
# name and options of small members of several families
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {"image_size": 64}),
    ("deit_tiny_distilled_patch16_224", {"image_size": 64}),
    ("eva02_tiny_patch14_224", {"image_size": 56}),
    ("vit_small_patch14_reg4_dinov2", {"image_size": 56}),
]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any use of the network fails at once."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield


def group(views: int, batch: int, size: int) -> ImageGroup:
    return ImageGroup(pixels=torch.randn(views, batch, 3, size, size), params=torch.zeros(views, batch, 0))


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_families_encode_views_of_several_sizes(name: str, options: dict[str, Any]) -> None:
    tower = TimmImage(SPEC, model=name, **options).eval()
    size, patch = tower.spec.image_size, tower.spec.patch_size
    groups = {"global": group(2, 1, size), "local": group(2, 1, 2 * patch)}
    plan = {"global": GroupPlan(views=(0, 1), tokens=(1,)), "local": GroupPlan(views=(1,), projected=False)}
    features = tower(groups, plan)
    whole = tower.model.forward_features(groups["global"].pixels[1])
    torch.testing.assert_close(
        features["global"].tokens[0], whole[:, tower.model.num_prefix_tokens :], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        features["global"].pooled[1], tower.model(groups["global"].pixels[1]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(features["global"].projected, features["global"].pooled @ tower.projection)
    assert features["local"].pooled.shape == (1, 1, tower.spec.width)
    assert features["local"].projected is None

    features["global"].projected.square().sum().backward()
    assert [n for n, p in tower.named_parameters() if p.grad is None] == []
    depths = {tower.layer_of(n) for n, _ in tower.named_parameters()}
    assert depths == set(range(tower.layer_count + 1))
    assert tower.layer_of("projection") == tower.layer_count


# those that public weights are of: DINOv2 with registers, DINOv3, MAE, SigLIP (the family's smallest, by its pooling)
PUBLIC: list[tuple[str, dict[str, Any]]] = [
    ("vit_small_patch14_reg4_dinov2", {"image_size": 56}),
    ("vit_small_patch16_dinov3", {"image_size": 64}),
    ("vit_tiny_patch16_224", {"image_size": 64, "pooling": "avg"}),
    ("vit_tiny_patch16_224", {"image_size": 64, "pooling": "map", "activation": "gelu_tanh"}),
]


@pytest.mark.parametrize(("name", "options"), PUBLIC, ids=["DINOv2", "DINOv3", "MAE", "SigLIP"])
@torch.no_grad()
def test_what_goes_on_from_public_weights(name: str, options: dict[str, Any]) -> None:
    """One parameter more, behind which pixels are not seen; drop path by depth; rates by depth; other patch counts."""
    tower = TimmImage(SPEC, model=name, mask_token=True, drop_path=0.3, **options).eval()
    plain = TimmImage(SPEC, model=name, **options)
    assert {n for n, _ in tower.named_parameters()} - {n for n, _ in plain.named_parameters()} == {"mask_token"}
    size, patch = tower.spec.image_size, tower.spec.patch_size
    masks = torch.zeros(1, 1, (size // patch) ** 2, dtype=torch.bool)
    masks[..., 1::3] = True
    pixels = torch.randn(1, 1, 3, size, size)
    under = masks.view(size // patch, -1).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    seen = [pixels, torch.where(under, torch.randn_like(pixels), pixels), torch.where(under, pixels, pixels + 1)]
    plan = {"x": GroupPlan(views=(0,), tokens=(0,), hide_masked=True, masked_tokens=True)}
    found = [tower({"x": ImageGroup(pixels=x, params=torch.zeros(1, 1, 0), masks=masks)}, plan)["x"] for x in seen]
    torch.testing.assert_close(found[0].tokens, found[1].tokens)
    torch.testing.assert_close(found[0].masked_tokens, found[0].tokens[masks])
    assert not torch.allclose(found[0].tokens, found[2].tokens)
    rates = [block.drop_path1.drop_prob for block in tower.model.blocks if hasattr(block.drop_path1, "drop_prob")]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3)
    depths = [tower.layer_of(f"model.blocks.{n}.norm1.weight") for n in range(len(tower.model.blocks))]
    assert depths == sorted(set(depths)) and tower.layer_of("mask_token") == 0 < depths[0]
    local = tower({"x": group(1, 1, 2 * patch)}, {"x": GroupPlan(views=(0,), tokens=(0,))})["x"]
    assert local.tokens.shape == (1, 1, 4, tower.spec.width) and local.pooled.isfinite().all()


PACKED: list[tuple[str, dict[str, Any]]] = [
    ("vit_small_patch14_reg4_dinov2", {"image_size": 28}),
    ("vit_tiny_patch16_224", {"image_size": 32}),
    ("vit_tiny_patch16_224", {"image_size": 32, "pooling": "avg"}),
    ("vit_tiny_patch16_224", {"image_size": 32, "pooling": "map", "activation": "gelu_tanh"}),
    ("test_vit", {"image_size": 32, "grad_checkpointing": True}),
]
PLANS = {
    "class tokens alone": {"global": GroupPlan(views=(0, 1)), "local": GroupPlan(views=(1, 0), projected=False)},
    "tokens and masks": {
        "global": GroupPlan(views=(0, 1), tokens=(1,), hide_masked=True, masked_tokens=True),
        "local": GroupPlan(views=(1,), tokens=(1,)),
    },
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("name", "options"), PACKED, ids=["DINOv2", "ViT", "MAE", "SigLIP", "checkpointed"])
def test_packed_views_are_what_timm_makes_of_each_group(
    name: str, options: dict[str, Any], plan: dict[str, GroupPlan]
) -> None:
    """Features and gradients; what timm has no plain blocks for is left as it is."""
    tower = TimmImage(SPEC, model=name, mask_token=True, **options)
    assert tower.packs
    patch = tower.spec.patch_size
    groups = {"global": group(2, 2, 2 * patch), "local": group(2, 2, patch)}
    masks = torch.rand(2, 2, 4) < 0.5
    masks[0, 0, 0] = True
    groups["global"] = replace(groups["global"], masks=masks)
    found = {}
    for tower.packs in (True, False):
        tower.zero_grad()
        features = tower(groups, plan)
        fields = ("pooled", "projected", "tokens", "masked_tokens")
        tensors = {f"{key}.{field}": getattr(each, field) for key, each in features.items() for field in fields}
        tensors = {key: value for key, value in tensors.items() if value is not None}
        sum(
            (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in tensors.values()
        ).backward()
        grads = {key: parameter.grad for key, parameter in tower.named_parameters() if parameter.grad is not None}
        found[tower.packs] = tensors | grads
    assert len(found[True]) > 20
    torch.testing.assert_close(found[True], found[False], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "resnet18"])
def test_other_blocks_are_left_to_timm(name: str) -> None:
    assert not TimmImage(SPEC, model=name).packs


def test_a_packed_branch_is_dropped_for_whole_images() -> None:
    """Of a tower of one block that drops either branch of half of the images: each is one of four, patch by patch."""
    tower = TimmImage(SPEC, model="test_vit", image_size=32, drop_path=0.5)
    tower.model.blocks = torch.nn.Sequential(tower.model.blocks[-1])
    tower.model.norm = torch.nn.Identity()
    x = ImageGroup(pixels=torch.randn(1, 1, 3, 32, 32).expand(1, 64, 3, 32, 32), params=torch.zeros(1, 64, 0))
    plan = {"x": GroupPlan(views=(0,), tokens=(0,))}
    tokens = tower({"x": x}, plan)["x"].tokens[0].flatten(1)
    kinds = torch.unique((tokens * 1e4).round(), dim=0)
    assert len(kinds) == 4  # both branches, either, none
    tower.eval()
    assert len(torch.unique((tower({"x": x}, plan)["x"].tokens[0].flatten(1) * 1e4).round(), dim=0)) == 1


def test_a_compiled_model_is_called_group_by_group() -> None:
    tower = TimmImage(SPEC, model="test_vit", image_size=32)
    groups, plan = {"x": group(1, 2, 32)}, {"x": GroupPlan(views=(0,), tokens=(0,))}
    expected = tower(groups, plan)["x"]
    tower.compile(backend="eager", fullgraph=False)
    found = tower(groups, plan)["x"]
    torch.testing.assert_close([found.projected, found.tokens], [expected.projected, expected.tokens])


def test_one_size_alone_is_said() -> None:
    tower = TimmImage(SPEC, model="cait_xxs24_224", image_size=32)
    assert not tower.dynamic
    with pytest.raises(UserError, match="takes images of 32x32 alone, not 16x16"):
        tower({"local": group(1, 1, 16)}, {"local": GroupPlan(views=(0,))})


def test_options() -> None:
    tower = TimmImage(SPEC, model="test_vit", drop_path=0.2, grad_checkpointing=True)
    assert tower.model.grad_checkpointing
    assert tower.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert tower.unread({"global": GroupPlan(views=(0,), projected=False)}) == ("projection*",)
    assert tower.unread({"global": GroupPlan(views=(0,))}) == ()


def test_faults_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"timm has no 'vit_bas_patch16_224'\. Did you mean 'vit_base_patch16_224'\?"):
        TimmImage(SPEC, model="vit_bas_patch16_224")
    with pytest.raises(UserError, match="'resnet18' has no patch tokens of one size to hide"):
        TimmImage(SPEC, model="resnet18", mask_token=True)

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to the hub\nand more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        UserError, match=r"^model: timm's 'vit_tiny_patch16_224' cannot be fetched: no route to the hub\. Reach .*$"
    ):
        TimmImage(SPEC, model="vit_tiny_patch16_224", pretrained=True)


def test_weights_are_not_fetched_for_shapes_alone() -> None:
    with torch.device("meta"):
        tower = TimmImage(SPEC, model="vit_tiny_patch16_224", pretrained=True)
    assert tower.spec.width == 192
