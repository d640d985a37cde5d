"""lightly's losses of two views as parts: equal to lightly called directly, on one rank and on two."""

import re
from itertools import combinations

import lightly.loss
import pytest
import torch
import torch.distributed as dist
from lightly.loss.hypersphere_loss import HypersphereLoss
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Need, Progress, Spec, StepContext, Views, ViewSpec
from cosmos_ssl.functional import gather
from cosmos_ssl_plugins.losses.lightly import Lightly

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # DCLWLoss called directly

SPEC = Spec(
    embed_dim=6,
    has_teacher=True,
    image_views={"global": ViewSpec(views=1, size=32), "ssl": ViewSpec(views=3, size=32)},
    heads={"project": {"ssl": 6}, "predict": {"ssl": 6}, "cross": {"image": 6, "text": 6}},
)
# Every class on offer, with options other than its own defaults.
LOSSES = {
    "BarlowTwinsLoss": {"lambda_param": 0.02},
    "DCLLoss": {"temperature": 0.3},
    "DCLWLoss": {"temperature": 0.3, "sigma": 0.7},
    "DirectCLRLoss": {"loss_dim": 4, "temperature": 0.2},
    "HypersphereLoss": {"t": 2, "lam": 0.5},
    "MACLLoss": {"temperature": 0.2, "alpha": 0.3},
    "NegativeCosineSimilarity": {"eps": 3.0},
    "NTXentLoss": {"temperature": 0.1},
    "VICRegLoss": {"lambda_param": 10.0, "nu_param": 2},
}


def draw(views, samples, seed):
    return torch.randn(views, samples, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lightlys(name, options):
    return (HypersphereLoss if name == "HypersphereLoss" else getattr(lightly.loss, name))(**options)


def context(student, teacher=None, projected=None):
    """A step's context in which heads gave these outputs, by head; ``projected`` are features of the tower."""

    def features(outputs):
        return Features(heads={head: {"ssl": gather(x, dim=1)} for head, x in outputs.items()})

    gathered = {"student": features(student), "teacher": features(teacher or {})}
    if projected is not None:
        group = GroupFeatures(views=tuple(range(len(projected))), projected=gather(projected, dim=1))
        gathered["student"] = Features(image={"ssl": group})
    empty = Features()  # whatever is compared was gathered
    return StepContext(
        views=Views(keys=[]),
        student=empty,
        teacher=empty,
        gathered=gathered,
        progress=Progress(step=0, total_steps=1),
        head=lambda *_: {},
    )


def with_gradient(function, x):
    leaf = x.clone().requires_grad_()
    loss = function(leaf)
    return loss, torch.autograd.grad(loss, leaf)[0]


def ours(name, options, x):
    loss = Lightly(SPEC, loss=name, options=options, head="project", group="ssl")
    return with_gradient(lambda leaf: loss(context({"project": leaf})).terms["pairs"], x)


def direct(name, options, x):
    """lightly's loss of each two views, averaged."""
    loss = lightlys(name, options)
    return with_gradient(
        lambda leaf: torch.stack([loss(leaf[i], leaf[j]) for i, j in combinations(range(len(x)), 2)]).mean(), x
    )


@pytest.mark.parametrize(("name", "options"), LOSSES.items())
@pytest.mark.parametrize("views", [2, 3])
def test_loss_and_gradient_are_lightlys(name, options, views):
    x = draw(views, 8, 0)
    found, expected = ours(name, options, x), direct(name, options, x)
    assert expected[1].abs().max() > 1e-4
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    with pytest.raises(AssertionError):  # the options do reach the class
        torch.testing.assert_close(found[0], direct(name, {}, x)[0], rtol=1e-10, atol=1e-12)


def test_nt_xent_is_the_published_formula():
    """SimCLR, arXiv 2002.05709, equation 1: so that not everything here hangs on lightly."""
    x = draw(2, 5, 0)
    unit = F.normalize(x.flatten(0, 1), dim=-1)
    similarity = (unit @ unit.T / 0.1).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(similarity, torch.arange(10).roll(5))
    torch.testing.assert_close(ours("NTXentLoss", {"temperature": 0.1}, x)[0], expected)


def _rank(rank, world, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    share = draw(2, 8, 0)[:, rank * 8 // world : (rank + 1) * 8 // world]
    for name, options in LOSSES.items():
        results[name, rank] = [x.detach().clone() for x in ours(name, options, share)]
        results[name, rank, "alone"] = direct(name, options, share)[0].detach()
    dist.destroy_process_group()


def test_two_ranks_are_one(in_ranks):
    """Averaged over ranks, as the engine does it: loss and gradients of the whole batch, statistics over samples
    included.
    """
    results = in_ranks(_rank, 2)
    for name, options in LOSSES.items():
        loss, gradient = direct(name, options, draw(2, 8, 0))
        ranks = [results[name, rank] for rank in range(2)]
        torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.cat([found[1] for found in ranks], 1) / 2, gradient, rtol=1e-10, atol=1e-12)
        apart = (results[name, 0, "alone"] + results[name, 1, "alone"]) / 2
        assert name == "NegativeCosineSimilarity" or (apart - loss).abs() > 1e-3  # what ranks by themselves would find


@pytest.mark.parametrize("target", ["student", "teacher"])
def test_a_target_of_its_own_gets_no_gradient(target):
    """SimSiam (arXiv 2011.10566, algorithm 1) and BYOL (arXiv 2006.07733, equation 2 in cosine form): each view
    predicts the others.
    """
    loss = Lightly(
        SPEC, loss="NegativeCosineSimilarity", head="predict", group="ssl", target=target, target_head="project"
    )
    p, z = draw(2, 5, 0).requires_grad_(), draw(2, 5, 1).requires_grad_()
    student = {"predict": p, "project": -z if target == "teacher" else z}
    term = loss(context(student, teacher={"project": z})).terms["pairs"]
    cosines = [F.cosine_similarity(p[i], z[1 - i].detach()).mean() for i in range(2)]
    expected = -(cosines[0] + cosines[1]) / 2
    torch.testing.assert_close(term, expected)
    torch.testing.assert_close(torch.autograd.grad(term, p, retain_graph=True), torch.autograd.grad(expected, p))
    assert torch.autograd.grad(term, z, allow_unused=True) == (None,)


def test_the_teachers_output_of_the_same_head():
    loss = Lightly(SPEC, loss="NTXentLoss", head="project", group="ssl", target="teacher")
    a, b = draw(3, 5, 0), draw(3, 5, 1)
    pairs = [lightlys("NTXentLoss", {})(a[i], b[j]) for i in range(3) for j in range(3) if i != j]
    torch.testing.assert_close(
        loss(context({"project": a}, teacher={"project": b})).terms["pairs"], torch.stack(pairs).mean()
    )


def test_features_of_the_tower_where_no_head_is_named():
    loss = Lightly(SPEC, loss="VICRegLoss", group="ssl")
    x = draw(2, 5, 0)
    torch.testing.assert_close(loss(context({}, projected=x)).terms["pairs"], direct("VICRegLoss", {}, x)[0])


def test_half_precision_is_computed_in_float32():
    x = draw(2, 5, 0).bfloat16()
    term = Lightly(SPEC, loss="NTXentLoss", head="project", group="ssl")(context({"project": x})).terms["pairs"]
    assert term.dtype == torch.float32
    torch.testing.assert_close(term.double(), direct("NTXentLoss", {}, x.double())[0], rtol=1e-5, atol=1e-5)


def test_what_it_asks_for():
    plain = Lightly(SPEC, loss="NTXentLoss", group="ssl")
    assert plain.requires() == [Need(modality="image", group="ssl", kind="projected", gathered=True)]
    same = Lightly(SPEC, loss="NTXentLoss", head="project", group="ssl", target_head="project")
    assert same.requires() == [Need(head="project", outputs=("ssl",), gathered=True)]
    byol = Lightly(SPEC, loss="NTXentLoss", head="predict", group="ssl", target="teacher", target_head="project")
    assert byol.requires() == [
        Need(head="predict", outputs=("ssl",), gathered=True),
        Need(role="teacher", head="project", outputs=("ssl",), gathered=True),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"temprature": 0.1}}, "options.temprature: unknown option of NTXentLoss. Accepts: temperature"),
        (
            {"options": {"gather_distributed": 1}},
            "options.gather_distributed: is not offered here. NTXentLoss accepts: temperature",
        ),
        ({"options": {"memory_bank_size": 64}}, "options.memory_bank_size: is not offered here"),
        ({"options": {"temperature": 0.0}}, "options: Illegal temperature"),
        ({"loss": "DirectCLRLoss", "options": {"loss_dim": 2.5}}, "options.loss_dim: expected a whole number, got 2.5"),
        ({"loss": "MACLLoss", "options": {"alpha": 2.0}}, "options: Alpha must be"),
        ({"head": "cross"}, "head: no head 'cross' with an output 'ssl'. Heads that have it: project, predict"),
        ({"target_head": "x"}, "target_head: no head 'x' with an output 'ssl'"),
        ({"group": "global", "head": None}, "group: 'global' has a single view, and pairs need two"),
    ],
)
def test_impossible_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Lightly(SPEC, **{"loss": "NTXentLoss", "head": "project", "group": "ssl", **arguments})
