"""The step: exact accumulation, gathered features, restored buffers, the losses' contract."""

import gc
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cosmos_ssl.api import (
    Curve,
    Head,
    ImageGroup,
    Loss,
    LossOutput,
    Need,
    PluginError,
    Progress,
    Spec,
    TextGroup,
    Views,
    ViewSpec,
)
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.exchange import GradientMean, spread
from cosmos_ssl.engine.forward import Forward
from cosmos_ssl.engine.step import Gradients
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import make_plan
from cosmos_ssl_plugins.heads.cross_attention import CrossAttention
from cosmos_ssl_plugins.losses.clip import Clip
from cosmos_ssl_plugins.losses.cross_modality_distillation import CrossModalityDistillation
from cosmos_ssl_plugins.optimizers.adamw import AdamW
from cosmos_ssl_plugins.schedules.ways import Cosine
from cosmos_ssl_plugins.teachers.ema import Ema
from cosmos_ssl_plugins.towers.clip_text import ClipText
from cosmos_ssl_plugins.towers.clip_vit import ClipViT

PROGRESS = Progress(step=3, total_steps=10)


def assemble(extra_losses=(), extra_heads=(), drop_path=0.0):
    torch.manual_seed(0)
    spec = Spec(
        embed_dim=16,
        batch_size=6,
        context_length=12,
        vocab_size=50,
        has_teacher=True,
        attention="sdpa",
        image_views={"global": ViewSpec(views=2, size=32), "local": ViewSpec(views=2, size=16)},
        text_views={"global": ViewSpec(views=2), "local": ViewSpec(views=1)},
    )

    def parts():
        towers = {
            "image": ClipViT(spec, width=32, heads=2, layers=2, patch_size=8, image_size=32, drop_path=drop_path),
            "text": ClipText(spec, width=24, heads=2, layers=2),
        }
        full = replace(
            spec, image=towers["image"].spec, text=towers["text"].spec, heads={"cross": {"image": 16, "text": 16}}
        )
        heads = {"cross": CrossAttention(full, num_heads=4), **{name: make(full) for name, make in extra_heads}}
        losses = {"clip": Clip(full), "distill": CrossModalityDistillation(full, head="cross")}
        return towers, heads, losses | {name: make(full) for name, make in extra_losses}

    def build():
        return Model(*parts()).double()

    towers, heads, losses = parts()
    model = Model(towers, heads, losses).double()
    teacher = Ema(spec)
    plan = make_plan(spec, towers, heads, losses)

    teacher.start(build, model)
    return Assembly(
        spec=spec,
        dataset=None,
        tokenizer=None,
        augmenters={},
        model=model,
        build_model=build,
        teacher=teacher,
        update_when="before_optimizer_step",
        plan=plan,
        loss_weights={name: 1.0 if name != "distill" else 0.5 for name in losses},
        optimizer=AdamW(spec),
        schedule=Cosine(spec),
    )


def batch(samples=6):
    generator = torch.Generator().manual_seed(1)

    def image(views, size):
        pixels = torch.randn(views, samples, 3, size, size, generator=generator, dtype=torch.float64)
        return ImageGroup(pixels=pixels, params=torch.zeros(views, samples, 0))

    def text(views):
        lengths = torch.randint(2, 13, (views, samples), generator=generator)
        tokens = torch.randint(1, 49, (views, samples, 12), generator=generator)
        return TextGroup(tokens=tokens.masked_fill(torch.arange(12) >= lengths[..., None], 0), lengths=lengths)

    return Views(
        keys=[str(i) for i in range(samples)],
        image={"global": image(2, 32), "local": image(2, 16)},
        text={"global": text(2), "local": text(1)},
    )


def gradients(model) -> Mapping[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_accumulation_equals_the_whole_batch(size, drop_path):
    """Losses and gradients to 1e-6 in float64; with drop path, micro-batches of the whole share replay its draws."""
    assembly = assemble(drop_path=drop_path)
    whole = Gradients(assembly, micro_batch_size=None)
    small = Gradients(assembly, micro_batch_size=size)
    if drop_path:  # other micro-batches draw other paths; what must hold is that both passes draw the same
        first = small(batch(), PROGRESS)
        expected = gradients(assembly.model)
        second = small(batch(), PROGRESS)
        assert torch.equal(first.loss, second.loss)
    else:
        first = whole(batch(), PROGRESS)
        expected = gradients(assembly.model)
        second = small(batch(), PROGRESS)
        assert first.logs.keys() == second.logs.keys()
        for name in first.logs:
            torch.testing.assert_close(first.logs[name], second.logs[name])
    found = gradients(assembly.model)
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_replayed_randomness_gives_the_true_gradient():
    """With drop path, the accumulated gradient equals a finite difference of the accumulated loss."""
    assembly = assemble(drop_path=0.5)
    step = Gradients(assembly, micro_batch_size=2)
    step(batch(), PROGRESS)
    weight = assembly.model.image.blocks[1].mlp.fc1.weight
    grad = weight.grad.clone()
    direction = torch.randn_like(weight)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * 1e-5)
        losses.append(step(batch(), PROGRESS).loss)
        with torch.no_grad():
            weight.sub_(direction, alpha=sign * 1e-5)
    slope = (losses[0] - losses[1]) / 2e-5
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-4, atol=1e-7)


def test_total_is_the_weighted_sum_and_every_parameter_gets_a_gradient():
    assembly = assemble()
    result = Gradients(assembly)(batch(), PROGRESS)
    torch.testing.assert_close(result.loss, result.logs["loss/clip"] + 0.5 * result.logs["loss/distill"])
    assert {"clip/logit_scale", "distill/teacher_entropy"} <= result.logs.keys()
    features = Forward(assembly).student(batch())
    for modality, groups in (("image", features.image), ("text", features.text)):
        unit = next(iter(groups.values())).unit[0]
        expected = unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5
        torch.testing.assert_close(
            spread(result.moments)[f"spread/{modality}"].float(), expected.float(), rtol=1e-5, atol=1e-6
        )
    assert all(p.grad is not None for p in assembly.model.parameters())
    assert all(p.grad is None for p in assembly.teacher.parameters())


class FromStepFive:
    """A schedule."""

    def left(self, progress):
        return float(progress.step < 5)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (3, 0.0), (7, 0.5)])
def test_a_loss_rests_while_its_weight_is_zero(size, step, weight, monkeypatch):
    """What it alone reads is not encoded, but at the first step; gradients are those of its weight."""
    encoded = set()
    encode = Model.encode

    def told(self, views, plan):
        encoded.update(("student" if self is assembly.model else "teacher", group) for group in plan.image)
        return encode(self, views, plan)

    monkeypatch.setattr(Model, "encode", told)
    curve = Curve[float](type="step", start=0.0, end=0.5).follow(FromStepFive())
    assembly = replace(assemble(), loss_weights={"clip": 1.0, "distill": curve})
    result = Gradients(assembly, micro_batch_size=size)(batch(), Progress(step=step, total_steps=10))
    rests = step == 3
    everything = {("student", "global"), ("student", "local"), ("teacher", "global")}
    assert encoded == ({("student", "global")} if rests else everything)
    assert ("loss/distill" in result.logs) == (not rests)

    whole = replace(assemble(), loss_weights={"clip": 1.0, "distill": weight})
    expected = Gradients(whole, micro_batch_size=size)(batch(), PROGRESS)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(gradients(assembly.model), gradients(whole.model))
    assert (gradients(assembly.model)["heads.cross.image_tokens.weight"] == 0).all() == (weight == 0)


def _rank_step(rank, world, path, micro_batch_size, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    assembly = assemble()
    share = batch().slice(rank * 6 // world, (rank + 1) * 6 // world)
    result = Gradients(assembly, micro_batch_size=micro_batch_size)(share, PROGRESS)
    results[rank] = (dict(result.logs), gradients(assembly.model))
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "micro_batch_size"), [(2, None), (3, None), (2, 1)])
def test_ranks_compute_what_one_computes(world, micro_batch_size, in_ranks):
    """On the same global batch, in float64: the mean of the losses, and on every rank the gradient of the whole
    batch.
    """
    results = in_ranks(_rank_step, world, micro_batch_size)
    ranks = [results[rank] for rank in range(world)]
    assembly = assemble()
    expected = Gradients(assembly)(batch(), PROGRESS)
    for name in ("loss", "loss/clip", "loss/distill"):
        torch.testing.assert_close(
            torch.stack([logs[name] for logs, _ in ranks]).mean(), expected.logs[name], rtol=1e-9, atol=0
        )
    for _, found in ranks:
        for name, grad in gradients(assembly.model).items():
            torch.testing.assert_close(
                found[name], grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


def _bf16_mean(rank, world, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(rank)
    parameters = [torch.nn.Parameter(torch.zeros(5, 3)), torch.nn.Parameter(torch.zeros(()))]
    own = [torch.randn(p.shape, generator=generator) for p in parameters]
    mean = GradientMean(parameters, torch.bfloat16)
    torch.autograd.backward(parameters, own)
    mean.finish()
    results[rank] = own, [p.grad for p in parameters]
    dist.destroy_process_group()


def test_gradients_averaged_in_bf16(in_ranks):
    """Each share is rounded, then their sum; what comes out is as wide as before, and the same on every rank."""
    results = in_ranks(_bf16_mean, 2)
    for first, second, *found in zip(results[0][0], results[1][0], results[0][1], results[1][1], strict=True):
        expected = ((first / 2).bfloat16() + (second / 2).bfloat16()).float()
        assert all(mean.dtype == torch.float32 and torch.equal(mean, expected) for mean in found)


class Counting(Loss):
    """A loss with a running centre."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(16, dtype=torch.float64))

    def requires(self):
        return [Need(modality="image", group="global")]

    def forward(self, ctx):
        x = ctx.student.image["global"].unit
        self.center.copy_(x.detach().mean((0, 1)))
        return LossOutput(terms={"center": (x - self.center).square().mean()})


def test_buffers_are_restored_when_a_step_is_skipped():
    assembly = assemble(extra_losses=[("counting", Counting)])
    step = Gradients(assembly)
    step(batch(), PROGRESS)
    moved = assembly.model.loss("counting").center.clone()
    assert moved.abs().sum() > 0
    step.restore_buffers()
    assert assembly.model.loss("counting").center.abs().sum() == 0
    assembly.model.loss("counting").center = torch.full((16,), 3.0, dtype=torch.float64)  # another tensor in its place
    step(batch(), PROGRESS)
    step.restore_buffers()
    assert assembly.model.loss("counting").center.tolist() == [3.0] * 16


@pytest.mark.parametrize("size", [None, 2])
def test_a_step_leaves_no_tensor_to_the_garbage_collector(size):
    """Which runs every so many steps only."""
    assembly = assemble(drop_path=0.2)
    for block in assembly.model.image.blocks:
        block.recompute = True
    step = Gradients(assembly, micro_batch_size=size)
    step(batch(), PROGRESS)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        step(batch(), PROGRESS)
        gc.collect()
        assert not [x for x in gc.garbage if isinstance(x, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


class Mixing(Head):
    """A head with batch norm."""

    mixes_samples = True

    def __init__(self, spec: Spec) -> None:
        super().__init__()

    def outputs(self):
        return {"image": 16}

    def requires(self, outputs):
        return [Need(modality="image", group="global")]

    def forward(self, features, views, outputs):
        x = features.image["global"].projected
        return {"image": x - x.mean((0, 1))}


class ReadsMixing(Counting):
    def requires(self):
        return [*super().requires(), Need(head="mixing")]


def test_accumulation_refuses_parts_that_cannot_by_name():
    assembly = assemble(extra_heads=[("mixing", Mixing)], extra_losses=[("reads", ReadsMixing)])
    with pytest.raises(PluginError, match=r"heads\.mixing mixes samples"):
        Gradients(assembly, micro_batch_size=2)


def returns(value):
    class Faulty(Counting):
        def forward(self, ctx):
            return value

    return Faulty


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(1.0), r"losses\.faulty returned Tensor, expected LossOutput"),
        (LossOutput(terms={"a": torch.ones(3)}), r"losses\.faulty returned 'a' of shape \[3\], expected a scalar"),
        (LossOutput(terms={}), r"losses\.faulty returned no terms"),
    ],
)
def test_a_loss_is_held_to_its_contract(value, message):
    with pytest.raises(PluginError, match=message):
        Gradients(assemble(extra_losses=[("faulty", returns(value))]))(batch(), PROGRESS)
