"""Projection heads against their published formulas and lightly's own heads of the same methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightly.models.modules import heads as lightlys
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Head, Need, Spec, TowerSpec, Views, ViewSpec
from cosmos_ssl.build import meta_device
from cosmos_ssl.config import OptimizerConfig
from cosmos_ssl.engine.optim import settings
from cosmos_ssl.models.model import Model
from cosmos_ssl_plugins.heads.dino_projection import DinoProjection
from cosmos_ssl_plugins.heads.dinov2_projection import DinoV2Projection
from cosmos_ssl_plugins.heads.projection import Projection

SPEC = Spec(
    embed_dim=6,
    image=TowerSpec(width=12, patch_size=4),
    text=TowerSpec(width=10),
    image_views={"global": ViewSpec(views=2, size=16, masks=True), "local": ViewSpec(views=3, size=8)},
    text_views={"global": ViewSpec(views=1), "local": ViewSpec(views=2)},
    heads={"first": {"global": 7, "local": 7}, "mixed": {"image": 4, "text": 5}},
)
VIEWS = Views(keys=list("abcde"))
SIZES = {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 24}
PROTOTYPES: list[Callable[..., Head]] = [DinoProjection, DinoV2Projection]


@pytest.fixture
def features() -> Features:
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).requires_grad_()

    return Features(
        image={
            "global": GroupFeatures(
                views=(0, 1), pooled=leaf(2, 5, 12), projected=leaf(2, 5, 6), masked_tokens=leaf(9, 12)
            ),
            "local": GroupFeatures(views=(0, 1, 2), pooled=leaf(3, 5, 12), projected=leaf(3, 5, 6)),
        },
        text={
            "global": GroupFeatures(views=(0,), pooled=leaf(1, 5, 10), projected=leaf(1, 5, 6)),
            "local": GroupFeatures(views=(0, 1), pooled=leaf(2, 5, 10), projected=leaf(2, 5, 6)),
        },
        heads={"first": {"global": leaf(2, 5, 7), "local": leaf(3, 5, 7)}},
    )


def formula(head: Any, x: Tensor) -> Tensor:
    """DINO, section 3.1: a 3-layer MLP with GELU, L2 norm, then directions of prototypes times their lengths."""
    first, second, third = (layer for layer in head.mlp.layers if isinstance(layer, nn.Linear))
    x = F.gelu(x @ first.weight.T + first.bias)
    x = F.gelu(x @ second.weight.T + second.bias)
    x = x @ third.weight.T + third.bias
    x = x / x.norm(dim=-1, keepdim=True)
    last = head.mlp.last_layer
    return x @ (last.weight_g * last.weight_v / last.weight_v.norm(dim=1, keepdim=True)).T


@pytest.mark.parametrize("make", PROTOTYPES)
def test_prototypes_equal_the_published_formula_and_its_gradients(
    make: Callable[..., Head], features: Features
) -> None:
    torch.manual_seed(0)
    head = make(SPEC, **SIZES)
    nn.init.uniform_(head.mlp.last_layer.weight_g, 0.5, 2)  # type: ignore[union-attr, arg-type]
    names = ("global", "local", "global_masked")
    inputs = [features.image["global"].pooled, features.image["local"].pooled, features.image["global"].masked_tokens]
    wanted = [*inputs, *(p for p in head.parameters() if p.requires_grad)]
    found, plain = head(features, VIEWS, names), [formula(head, x) for x in inputs if x is not None]
    assert list(found) == list(names)
    for ours, theirs in zip(found.values(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weights = [torch.randn_like(x) for x in plain]
    ours, theirs = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), wanted)  # type: ignore[arg-type]
        for outputs in (found.values(), plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", PROTOTYPES)
def test_published_sizes(make: Callable[..., Head]) -> None:
    """K = 65,536, hidden 2,048, bottleneck 256: for a ViT-S/16 (width 384) 21.7 million weights, 16.8 of them
    prototypes.
    """
    with meta_device():
        head = make(Spec(embed_dim=8, image=TowerSpec(width=384), image_views=SPEC.image_views))
    assert head.outputs() == dict.fromkeys(("global", "local", "global_masked", "global_patches"), 65536)
    mlp = (384 * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 256 + 256)
    assert sum(p.numel() for p in head.parameters()) == mlp + 65536 * 256 + 65536
    assert not list(head.buffers()) and not head.mixes_samples


def test_only_what_is_asked_for_is_asked_for_and_computed(features: Features) -> None:
    head = DinoProjection(SPEC, **SIZES)
    assert head.requires(["local"]) == [Need(modality="image", group="local", kind="pooled")]
    assert head.requires(["global_masked"]) == [Need(modality="image", group="global", kind="masked_tokens")]
    rows: list[int] = []
    head.mlp.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    found = head(features, VIEWS, ("global", "global_masked"))
    assert rows == [2 * 5 + 9]  # one pass
    assert {name: tuple(x.shape) for name, x in found.items()} == {"global": (2, 5, 24), "global_masked": (9, 24)}
    torch.testing.assert_close(head(features, VIEWS, ("global",))["global"], found["global"])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_all_patches(batch_norm: bool) -> None:
    torch.manual_seed(0)
    head = DinoProjection(SPEC, **SIZES, batch_norm=batch_norm)
    assert head.requires(["global_patches"]) == [Need(modality="image", group="global", kind="tokens")]
    tokens = torch.randn(2, 5, 16, 12)
    group = GroupFeatures(views=(0, 1), tokens=tokens, token_views=(0, 1))
    found = head(Features(image={"global": group}), VIEWS, ("global_patches",))
    expected = torch.stack([head.mlp(view.flatten(0, 1)).view(5, 16, 24) for view in tokens])
    torch.testing.assert_close(found["global_patches"], expected)


def test_no_masked_patches(features: Features) -> None:
    head = DinoProjection(SPEC, **SIZES)
    empty = Features(
        image={"global": GroupFeatures(views=(0, 1), pooled=torch.ones(2, 5, 12), masked_tokens=torch.empty(0, 12))}
    )
    found = head(empty, VIEWS, ("global_masked",))["global_masked"]
    assert found.shape == (0, 24)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters() if p.requires_grad)


def test_without_masks_there_are_no_masked_outputs() -> None:
    spec = Spec(embed_dim=8, image=TowerSpec(width=12), image_views={"global": ViewSpec(views=2)})
    assert DinoProjection(spec, **SIZES).outputs() == {"global": 24}


@pytest.mark.parametrize("make", [*PROTOTYPES, Projection])
def test_a_rebuilt_copy_takes_the_state(make: Callable[..., Head], features: Features) -> None:
    options = {name: size for name, size in SIZES.items() if make is not Projection or name != "bottleneck_dim"}
    head = make(SPEC, **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = head(features, VIEWS, ("global", "local"))
    copy = make(SPEC, **options)
    copy.load_state_dict(head.state_dict())
    copy.requires_grad_(False).eval()
    after = copy(features, VIEWS, ("global", "local"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with meta_device():
        assert all(p.is_meta for p in make(SPEC, **options).parameters())


@pytest.mark.parametrize(("norm_last_layer", "lengths"), [(True, math.inf), (False, 1.0)])
def test_the_last_layer_rests(norm_last_layer: bool, lengths: float) -> None:
    model = Model({}, {"dino": DinoProjection(SPEC, norm_last_layer=norm_last_layer, **SIZES)}, {})
    found = {
        name.rpartition("mlp.")[2]: setting.frozen_epochs
        for name, setting in settings(model, OptimizerConfig()).items()
    }
    assert found.pop("last_layer.weight_g") == lengths and found.pop("last_layer.weight_v") == 1.0
    assert set(found.values()) == {0.0}


def test_prototypes_of_fixed_length_take_no_gradient() -> None:
    assert not DinoProjection(SPEC, **SIZES).mlp.last_layer.weight_g.requires_grad  # type: ignore[union-attr]
    assert DinoProjection(SPEC, norm_last_layer=False, **SIZES).mlp.last_layer.weight_g.requires_grad  # type: ignore[union-attr]
    assert DinoV2Projection(SPEC, **SIZES).mlp.last_layer.weight_g.requires_grad  # type: ignore[union-attr]


# Options of ``projection`` that make the published head, and lightly's class of it.
PUBLISHED: list[tuple[dict[str, Any], nn.Module]] = [
    ({"hidden_dim": 16, "output_dim": 9, "batch_norm": False}, lightlys.MoCoProjectionHead(12, 16, 9)),
    ({"hidden_dim": 16, "output_dim": 9}, lightlys.BYOLProjectionHead(12, 16, 9)),
    ({"hidden_dim": 16, "output_dim": 9, "layers": 3}, lightlys.BarlowTwinsProjectionHead(12, 16, 9)),
    (
        {"hidden_dim": 16, "output_dim": 9, "layers": 3, "output_batch_norm": True},
        lightlys.SimSiamProjectionHead(12, 16, 9),
    ),
]


@pytest.mark.parametrize(("options", "theirs"), PUBLISHED, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("teacher", [False, True])
def test_projection_equals_lightlys_heads_called_view_by_view(
    options: dict[str, Any], theirs: nn.Module, teacher: bool, features: Features
) -> None:
    """Also a teacher in evaluation mode uses the statistics of its batch."""
    ours = Projection(SPEC, **options).train(not teacher)
    weights = {
        name: value for name, value in theirs.state_dict().items() if "running" not in name and "batches" not in name
    }
    ours.mlp.load_state_dict(weights)
    assert ours.mixes_samples == any(isinstance(module, nn.BatchNorm1d) for module in theirs.modules())
    theirs.train()
    found = ours(features, VIEWS, ("global", "local"))
    for name in ("global", "local"):
        pooled = features.image[name].pooled
        assert pooled is not None
        expected = torch.stack([theirs(view) for view in pooled])
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
        direction = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad((x * direction).sum(), pooled, retain_graph=True)[0] for x in (found[name], expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_dino_with_batch_norm_normalises_view_by_view(features: Features) -> None:
    head = DinoProjection(SPEC, batch_norm=True, **SIZES).eval()
    assert head.mixes_samples
    both, alone = head(features, VIEWS, ("global", "local")), head(features, VIEWS, ("global",))
    assert torch.equal(both["global"], alone["global"])
    reference = lightlys.DINOProjectionHead(12, 16, 8, 24, batch_norm=True)
    reference.load_state_dict(head.mlp.state_dict(), strict=False)
    pooled = features.image["global"].pooled
    assert pooled is not None
    torch.testing.assert_close(both["global"], torch.stack([reference(view) for view in pooled]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"input": "projected"}, ("image", "projected")),
        ({"input": "pooled", "modality": "text"}, ("text", "pooled")),
        ({"input": "projected", "modality": "text", "activation": "gelu"}, ("text", "projected")),
    ],
)
def test_input_of_a_tower(options: dict[str, Any], read: tuple[str, str], features: Features) -> None:
    modality, kind = read
    head = Projection(SPEC, hidden_dim=16, output_dim=9, batch_norm=False, **options)
    assert head.outputs() == {"global": 9, "local": 9}  # masked patches have no projected form, texts have no masks
    assert head.requires(["local"]) == [Need(modality=modality, group="local", kind=kind)]  # type: ignore[arg-type]
    x = getattr(features.of(modality)["local"], kind)  # type: ignore[arg-type]
    first, _, second = head.mlp.layers  # type: ignore[union-attr, misc]
    act = F.gelu if "activation" in options else F.relu
    expected = second(act(first(x)))  # type: ignore[operator]
    torch.testing.assert_close(head(features, VIEWS, ("local",))["local"], expected)


def test_input_of_another_head(features: Features) -> None:
    """A prediction head: the outputs are those of the head that it reads, of whichever role it runs on."""
    head = Projection(SPEC, input="first", hidden_dim=16, output_dim=7)
    assert head.outputs() == {"global": 7, "local": 7}
    assert head.requires(["global"]) == [Need(head="first", outputs=("global",))]
    found = head(features, VIEWS, ("global",))["global"]
    torch.testing.assert_close(found, torch.stack([head.mlp(view) for view in features.heads["first"]["global"]]))


def test_one_layer_is_a_linear_map() -> None:
    head = Projection(SPEC, layers=1, output_dim=9)
    assert [tuple(p.shape) for p in head.parameters()] == [(9, 12), (9,)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("second", "input: no head 'second' is listed above this one. There are: pooled, projected, first, mixed"),
        ("mixed", "input: the outputs of 'mixed' differ in width"),
    ],
)
def test_impossible_inputs_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Projection(SPEC, input=name)


def test_a_missing_tower_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.image"):
        DinoProjection(Spec(embed_dim=8, text=TowerSpec(width=10)))
    with pytest.raises(ValueError, match=r"modality: the config has no model\.text"):
        Projection(Spec(embed_dim=8, image=TowerSpec(width=10)), modality="text")
