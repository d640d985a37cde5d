"""Rules, schedules, and the optimiser's state by name."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cosmos_ssl import api
from cosmos_ssl.api import Curve, Progress, Spec
from cosmos_ssl.config import Config, OptimizerConfig, RuleConfig, ScheduleConfig, TrainingConfig
from cosmos_ssl.engine.optim import Optimizer, learning_rate, settings, weight_decay
from cosmos_ssl.errors import CheckpointError, PluginError, UserError
from cosmos_ssl.models.model import Model
from cosmos_ssl_plugins.optimizers.adamw import AdamW
from cosmos_ssl_plugins.optimizers.timm import Timm
from cosmos_ssl_plugins.optimizers.torch import Torch
from cosmos_ssl_plugins.schedules.ways import Cosine, Linear

GOLDEN = Path(__file__).parents[1] / "data/golden"
CPU = torch.device("cpu")
SPEC = Spec(embed_dim=6)


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return Model({"image": tiny.Flat()}, {}, {"match": tiny.Match()})


def optimizer_for(model, part=None, training=None, **options):
    sections = Config(
        optimizer=OptimizerConfig(**options),
        schedule=ScheduleConfig(epochs=1, warmup_steps=0),
        training=TrainingConfig(**training or {}),
    )
    return Optimizer(model, sections, CPU, part or AdamW(SPEC), Cosine(SPEC))


def at(step, total):
    return Progress(step=step, total_steps=total)


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_learning_rate_is_the_recorded_one():
    meta = json.loads((GOLDEN / "meta.json").read_text())
    recorded = load_file(GOLDEN / "golden.safetensors")["trajectory"][:, meta["trajectory_columns"].index("lr")]
    told = meta["optimizer"]
    schedule, total = ScheduleConfig(warmup_steps=told["warmup_steps"]), told["total_steps"]
    ours = [learning_rate(told["lr"], schedule, Cosine(SPEC), at(step, total)) for step in range(total)]
    assert ours == pytest.approx(recorded.tolist(), rel=1e-12)


def test_final_lr_and_weight_decay_are_approached_by_a_cosine():
    config = OptimizerConfig(weight_decay=0.04, weight_decay_end=0.4)
    schedule = ScheduleConfig(warmup_steps=0, final_lr=0.1)
    assert learning_rate(1.0, schedule, Cosine(SPEC), at(5, 10)) == pytest.approx(0.55)
    assert [weight_decay(config, at(step, 10)) for step in (0, 5, 10)] == pytest.approx([0.04, 0.22, 0.4])
    warm = ScheduleConfig(warmup_steps=4, warmup_start_lr=0.2)
    assert [learning_rate(1.0, warm, Cosine(SPEC), at(step, 10)) for step in (0, 3, 4)] == pytest.approx([0.4, 1, 1])
    assert weight_decay(OptimizerConfig(weight_decay=0.5), at(7, 10)) == 0.5
    falling = OptimizerConfig(weight_decay={"type": "linear", "start": 0.4, "end": 0.0})
    falling.weight_decay.follow(Linear(SPEC))
    assert weight_decay(falling, at(5, 10)) == 0.2


@pytest.mark.parametrize("step", [0, 1, 2, 3, 6, 999, 1000])
def test_a_cosine_has_the_bits_that_it_had_before_it_was_a_part(step):
    """The formulas as they stood in the engine and in the moving average."""
    lr, final, warmup, total, start, end = 3e-4, 1e-6, 3, 1007, 0.996, 1.0
    schedule, cosine = ScheduleConfig(warmup_steps=warmup, final_lr=final), Cosine(SPEC)
    done = (step - warmup) / (total - warmup)
    was = lr * (step + 1) / warmup if step < warmup else final + (lr - final) * (1 + math.cos(math.pi * done)) / 2
    assert learning_rate(lr, schedule, cosine, at(step, total)) == was
    momentum = end - (end - start) * (1 + math.cos(math.pi * (step / total))) / 2
    assert Curve(type="cosine", start=start, end=end).follow(cosine).at(at(step, total)) == momentum


def test_only_matrices_decay_unless_a_rule_says_otherwise(model):
    rules = {"stem": RuleConfig(match="image.stem.*", decay_1d=True)}
    optimizer = optimizer_for(model, lr=1.0, weight_decay=0.5, rules=rules)
    optimizer.set(Progress(step=0, total_steps=10))
    decays = {id(p): group["weight_decay"] for group in optimizer.torch.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "image.stem.weight": 0.5,
        "image.stem.bias": 0.5,
        "image.projection.weight": 0.5,
        "image.projection.bias": 0.0,
        "losses.match.scale": 0.0,
    }


def test_rules_of_parts_config_and_depth_meet(model):
    rules = {
        "towers": RuleConfig(match="image.*", weight_decay_scale=0.1),
        "stem": RuleConfig(match="image.stem.*", lr_scale=0.25, frozen_epochs=1.5),
        "scale": RuleConfig(match="losses.match.scale", frozen=True),
    }
    found = settings(model, OptimizerConfig(layer_decay=0.5, rules=rules))
    stem, projection = found["image.stem.bias"], found["image.projection.weight"]
    assert stem.lr_scale == 0.25 * 0.5**2  # the config's rule beats the part's, depth multiplies
    assert settings(model, OptimizerConfig(layer_decay=0.5))["image.stem.bias"].lr_scale == 0.5 * 0.5**2
    assert (projection.lr_scale, projection.weight_decay_scale) == (1.0, 0.1)
    assert (stem.weight_decay_scale, stem.frozen_epochs) == (0.1, 1.5)
    assert found["losses.match.scale"].frozen_epochs == math.inf


def test_a_rule_without_a_parameter_is_named(model):
    with pytest.raises(
        UserError,
        match=r"optimizer\.rules\.stem\.match: 'image\.stem\.wieght' matches no parameter\. Did you mean "
        r"'image\.stem\.weight'",
    ):
        settings(model, OptimizerConfig(rules={"stem": RuleConfig(match="image.stem.wieght")}))


def test_layer_decay_wants_a_tower_that_tells_its_layers(model):
    del model.image.layer_count
    model.image.part_name = "flat"
    with pytest.raises(UserError, match="layer_decay: the image tower 'flat'"):
        settings(model, OptimizerConfig(layer_decay=0.5))


def test_frozen_parameters_do_not_move(model):
    rules = {
        "stem": RuleConfig(match="image.stem.*", frozen=True),
        "projection": RuleConfig(match="image.projection.*", frozen_epochs=1),
    }
    optimizer = optimizer_for(model, lr=0.1, weight_decay=0.5, rules=rules)
    assert not model.image.stem.weight.requires_grad
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def moved_at(step):
        fill_gradients(model, step)
        progress = Progress(step=step, total_steps=10, steps_per_epoch=2)
        optimizer.set(progress)
        optimizer.drop_frozen(progress)
        optimizer.step()
        return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    assert moved_at(1) == {"losses.match.scale"}  # not even decayed
    assert moved_at(2) == {"losses.match.scale", "image.projection.weight", "image.projection.bias"}


def test_everything_frozen_is_refused(model):
    with pytest.raises(UserError, match="nothing to train"):
        optimizer_for(model, rules={"all": RuleConfig(match="*", frozen=True)})


def test_clipping_returns_the_norm_before_it(model):
    fill_gradients(model, 0)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert optimizer_for(model).clip().item() == pytest.approx(expected.item())
    clipping = optimizer_for(model, training={"clip_grad_norm": 0.5})
    assert clipping.clip().item() == pytest.approx(expected.item())
    assert clipping.clip().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("per", ["module", "parameter"])
def test_each_module_or_parameter_is_clipped_by_itself(model, per):
    fill_gradients(model, 0)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = optimizer_for(model, training={"clip_grad_norm": 1.5, "clip_grad_per": per}).clip()
    assert norm.item() == pytest.approx(torch.cat([x.flatten() for x in before.values()]).norm().item())
    together = [["losses.match.scale"], [name for name in before if name.startswith("image.")]]
    for names in together if per == "module" else [[name] for name in before]:
        own = torch.cat([before[name].flatten() for name in names]).norm()
        for name in names:
            expected = before[name] * min(1.5 / own.item(), 1)
            torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-6)


# Of timm all families: those that differ by a flag alone are left out.
BY_NAME = [AdamW(SPEC)]
BY_NAME += [
    Timm(SPEC, name=name)
    for name in (
        *("adabelief", "adadelta", "adafactor", "adafactorbv", "adagrad", "adamax", "adamp", "adamuon", "adan"),
        *("adopt", "clion", "lamb", "laprop", "larc", "lars", "lion", "madgrad", "mars", "muon", "nadamw", "novograd"),
        *("radam", "rmsproptf", "sgdp", "sgdw", "nesterov"),
    )
]
BY_NAME += [
    Torch(SPEC, name=name)
    for name in ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop")
]
BY_NAME += [Torch(SPEC, name="SGD", options={"momentum": 0.9}), Torch(SPEC, name="SGD")]


@pytest.mark.parametrize("part", BY_NAME, ids=lambda part: f"{type(part).__name__}-{getattr(part, 'name', '')}")
def test_state_goes_through_names_to_the_last_bit(tiny, model, part):
    other = Model({"image": tiny.Flat()}, {}, {"match": tiny.Match()})
    first, second = optimizer_for(model, part, lr=0.1), optimizer_for(other, part, lr=0.1)
    for step in range(3):
        fill_gradients(model, step)
        first.step()
    other.load_state_dict(model.state_dict())
    second.load({name: value.clone() for name, value in first.tensors().items()})
    for step in range(3, 6):
        for each, optimizer in ((model, first), (other, second)):
            fill_gradients(each, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if isinstance(part, AdamW):  # what older versions wrote
        kept = {"step", "exp_avg", "exp_avg_sq"}
        assert set(first.tensors()) == {f"{name}.{key}" for name, _ in model.named_parameters() for key in kept}


def test_a_state_of_another_model_is_refused(model):
    with pytest.raises(CheckpointError, match=r"not trained here: image\.other\.exp_avg"):
        optimizer_for(model).load({"image.other.exp_avg": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"image\.stem\.bias is incomplete"):
        optimizer_for(model).load({"image.stem.bias.exp_avg": torch.zeros(6)})


def test_fused_agrees_with_the_plain_rule(model):
    optimizer = optimizer_for(model, lr=0.1, weight_decay=0.5)
    twin = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    plain = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": 0.5 if p.dim() > 1 else 0.0,
                "lr": 0.05 if name == "image.stem.bias" else 0.1,
            }
            for name, p in twin.items()
        ],
        betas=(0.9, 0.98),
        eps=1e-8,
        foreach=False,
    )
    for step in range(4):
        fill_gradients(model, step)
        for own, other in zip(model.parameters(), twin.values(), strict=True):
            other.grad = own.grad.clone()
        optimizer.set(Progress(step=0, total_steps=10))
        optimizer.step()
        plain.step()
    for own, other in zip(model.parameters(), twin.values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_what_no_checkpoint_or_group_holds_is_refused(model):
    class Odd(api.Optimizer):
        def make(self, groups, device):
            return torch.optim.SGD([{**group, "params": group["params"][:1]} for group in groups], lr=0.1)

    class Keeps(torch.optim.SGD):
        def step(self):
            self.state[self.param_groups[0]["params"][0]]["names"] = {"a": 1}

    class Dict(api.Optimizer):
        def make(self, groups, device):
            return Keeps(groups, lr=0.1)

    with pytest.raises(PluginError, match="optimizer has other groups than it was given"):
        optimizer_for(model, Odd())
    optimizer = optimizer_for(model, Dict())
    optimizer.step()
    with pytest.raises(PluginError, match="keeps a dict as 'names', which no checkpoint holds"):
        optimizer.tensors()


@pytest.mark.parametrize(
    ("part", "name", "options", "words"),
    [
        (Timm, "lino", None, r"name: timm has no optimiser 'lino'\. Did you mean 'lion'\?"),
        (Timm, "lion", {"beta": 1}, r"options\.beta: unknown option of lion\. Did you mean 'betas'\? Accepts: betas, "),
        (Timm, "adahessian", None, "needs second derivatives"),
        (Timm, "kron", None, "draws by itself"),
        (Torch, "nadam", None, r"torch\.optim has no optimiser 'nadam'\. Did you mean 'NAdam'\?"),
        (Torch, "Optimizer", None, "has no optimiser"),
        (Torch, "LBFGS", None, "several times a step"),
        (Torch, "SparseAdam", None, "sparse gradients alone"),
        (Torch, "SGD", {"lr": 1.0}, r"options\.lr: unknown option of SGD"),
    ],
)
def test_names_and_options_that_cannot_be_used(part, name, options, words):
    with pytest.raises(ValueError, match=words):
        part(SPEC, name=name, options=options)


def test_what_the_constructor_refuses_is_said(model):
    with pytest.raises(UserError, match="optimizer: Muon cannot be used so: Muon only supports 2D parameters"):
        optimizer_for(model, Torch(SPEC, name="Muon"))
    with pytest.raises(UserError, match="optimizer: Rprop has no weight decay"):
        optimizer_for(model, Torch(SPEC, name="Rprop"))
    assert optimizer_for(model, Torch(SPEC, name="Rprop"), weight_decay=0.0).torch
    with pytest.raises(UserError, match="optimizer: NAdam cannot be used so: Invalid beta parameter"):
        optimizer_for(model, Torch(SPEC, name="NAdam", options={"betas": [2, 0.9]}))
