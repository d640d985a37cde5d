"""What a step computes: groups read whole, hidden and in part at once, and what is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cosmos_ssl import testing
from cosmos_ssl.api import (
    ALL,
    Features,
    GroupPlan,
    Head,
    HeadOutput,
    Loss,
    LossOutput,
    Need,
    PluginError,
    Spec,
    StepContext,
    Views,
)
from cosmos_ssl.build import Builder
from cosmos_ssl.engine.step import Gradients
from cosmos_ssl.errors import ConfigError
from cosmos_ssl.models.plan import make_plan
from cosmos_ssl.testing.examples import PROGRESS, directed, example_assembly, example_views, reader

IMAGE = {"modality": "image", "group": "global"}
WHOLE, UNSAID, MASKED = Need(**IMAGE, hidden=False), Need(**IMAGE), Need(**IMAGE, kind="masked_tokens")
HIDDEN = Need(**IMAGE, kind="masked_tokens", hidden=True)


def assembly(*needs: Sequence[Need] | type[Loss] | None, **changes: Any) -> Any:
    """The example model with a loss for each list of needs, ``l0``, ``l1`` ..., or of each class."""
    kinds = [each if isinstance(each, type) else reader(*each) for each in needs if each is not None]
    losses: dict[str, Any] = {f"l{i}": {"type": kind} for i, kind in enumerate(kinds)}
    tree = {"losses": {"clip": None, **losses}, "heads": {"cross": None}}
    return example_assembly(testing.example_config(tree, changes))


def terms(*needs: Sequence[Need] | type[Loss] | None) -> dict[str, Tensor]:
    """What a step of these losses logs."""
    made = assembly(*needs)
    nn.init.normal_(made.model.image.mask_token, generator=torch.Generator().manual_seed(0))
    made.start_teacher()
    return dict(Gradients(made)(example_views(made.spec), PROGRESS).logs)


def test_a_reader_of_hidden_patches_changes_nothing_for_others() -> None:
    alone, both = terms([UNSAID]), terms([UNSAID], [HIDDEN])
    assert torch.equal(alone["loss/l0"], both["loss/l0"])
    assert torch.equal(both["loss/l1"], terms([HIDDEN])["loss/l0"])
    student = assembly([UNSAID], [HIDDEN], [Need(**IMAGE, kind="tokens", hidden="drop")]).plan.student
    assert student.image == {
        "global": GroupPlan(views=(0, 1)),
        "global, masked patches hidden": GroupPlan(views=(0, 1), projected=False, hide_masked=True, masked_tokens=True),
        "global, masked patches left out": GroupPlan(views=(0, 1), projected=False, drop_masked=True, tokens=(0, 1)),
    }


def test_who_does_not_say_sees_what_a_reader_of_masked_patches_sees_that_does_not_say_either() -> None:
    """As in version 1, where one tower pass a group served all; whoever says sees what it asks for."""
    unsaid = terms([UNSAID, MASKED])
    assert torch.equal(unsaid["loss/l0/image_global_projected"], terms([UNSAID], [MASKED])["loss/l0"])
    both = terms([MASKED], [UNSAID], [WHOLE], [Need(**IMAGE, hidden=True)])
    hidden, whole = terms([Need(**IMAGE, hidden=True)])["loss/l0"], terms([WHOLE])["loss/l0"]
    for found, expected in ((both["loss/l1"], hidden), (both["loss/l3"], hidden), (both["loss/l2"], whole)):
        torch.testing.assert_close(found, expected)
    assert not torch.isclose(whole, hidden)
    assert torch.equal(terms([MASKED])["loss/l0"], terms([HIDDEN])["loss/l0"])
    made = assembly([MASKED], [UNSAID])
    assert list(made.plan.student.image) == ["global"]  # one pass, as before
    rest = made.plan_without(frozenset({"l0"})).student.image
    assert rest == {"global": GroupPlan(views=(0, 1), hide_masked=True)}  # still hidden while who hides it rests


def test_what_is_gathered_has_its_form() -> None:
    class Gathered(Loss):
        needs = (Need(**IMAGE, gathered=True), Need(**IMAGE, hidden=True, gathered=True))

        def __init__(self, spec: Spec) -> None:
            super().__init__()

        def requires(self) -> Sequence[Need]:
            return self.needs

        def forward(self, ctx: StepContext) -> LossOutput:
            for found, given in zip(ctx.gathered.values(), (ctx.teacher, ctx.student), strict=True):
                for hidden in (None, True) if given is not None else ():
                    assert given is not None
                    x, y = (each.of("image", hidden=hidden)["global"].projected for each in (found, given))
                    assert x is not None and y is not None and torch.equal(x, y)
            return LossOutput(terms={"x": directed(ctx.gathered["student"].image["global"].unit)})

    class Whole(Gathered):
        needs = (Need(**IMAGE, gathered=True, hidden=False), MASKED)

        def forward(self, ctx: StepContext) -> LossOutput:
            x = ctx.gathered["student"].image["global"].projected
            assert x is not None and torch.equal(x, ctx.student.image["global"].projected)  # type: ignore[arg-type]
            return LossOutput(terms={"x": directed(x)})

    Whole.needs = (Need(**IMAGE, gathered=True, hidden=False),)
    assert torch.equal(terms(Gathered)["loss/l0"], terms([UNSAID], Gathered)["loss/l1"])
    assert torch.equal(terms(Whole)["loss/l0"], terms(Whole, [MASKED], [UNSAID])["loss/l0"])


def test_others_parts_that_patches_are_hidden_from_are_told() -> None:
    made = assembly([MASKED], [UNSAID], [WHOLE])
    for name, source in (("l0", "ours"), ("l1", "mine 1.0"), ("l2", "mine 1.0")):
        made.model.loss(name).part_source = source
    losses = {name: made.model.loss(name) for name in made.model.losses}
    told = make_plan(made.spec, made.model.towers, {}, losses).warnings
    assert list(told) == [
        "losses.l1 (mine 1.0) reads the image group 'global' with its masked patches hidden, since losses.l0 (ours) "
        "reads masked patches of it. Say Need(hidden=False), or hidden=True, in requires()"
    ]


def test_a_teacher_sees_all() -> None:
    roles = [Need(**IMAGE, hidden="drop"), Need(**IMAGE, role="teacher", hidden="drop")]
    plan = assembly(roles).plan
    assert plan.student.image["global"] == GroupPlan(views=(0, 1), drop_masked=True)
    assert plan.teacher is not None and plan.teacher.image == {"global": GroupPlan(views=(0, 1))}
    teacher = Features(image={})
    assert teacher.of("image", hidden="drop") == teacher.of("image")


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ([Need(modality="image", hidden=True)], "reads hidden patches of 'local', and augmenters.image draws no masks"),
        ([WHOLE, MASKED], "reads image 'global' with hidden=False, and its masked_tokens without saying"),
        ([Need(modality="image", kind="tokens", causal=True)], "the image tower 'image' is not causal"),
        (
            [Need(modality="text", group="global", kind="tokens", hidden="drop")],
            "the text tower 'text' cannot do without them",
        ),
        ([Need(modality="text", group="none", kind="views")], "reads the text views 'none', which augmenters.text"),
    ],
)
def test_what_is_not_on_offer_is_refused(needs: Sequence[Need], words: str) -> None:
    with pytest.raises(PluginError, match=words.replace("(", r"\(")):
        assembly(needs)


def test_needs_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="cannot have them left out"):
        Need(**IMAGE, kind="masked_tokens", hidden="drop")
    with pytest.raises(ValueError, match="hidden=True, False or 'drop', not 'some'"):
        Need(**IMAGE, hidden="some")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- parts that these doors are for


class Predictor(Head):
    """I-JEPA's: masked patches from those that are seen, which alone were encoded."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        assert spec.image is not None
        width = spec.image.width
        self.mask, self.place = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(16, width))
        self.mix = nn.TransformerEncoderLayer(width, 2, width, 0.0, batch_first=True)
        self.width = width

    def outputs(self) -> Mapping[str, int]:
        return {"masked": self.width}

    def requires(self, outputs: Collection[str]) -> Sequence[Need]:
        return [Need(**IMAGE, kind="tokens", hidden="drop")]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        tokens, masks = features.of("image", hidden="drop")["global"].tokens, views.image["global"].masks
        assert tokens is not None and masks is not None
        x = torch.where(masks[..., None], self.mask, tokens) + self.place
        return {"masked": self.mix(x.flatten(0, 1)).view_as(x)[masks]}


class Jepa(Loss):
    """The teacher's features at masked patches."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()

    def requires(self) -> Sequence[Need]:
        return [Need(head="predictor"), Need(**IMAGE, role="teacher", kind="masked_tokens")]

    def forward(self, ctx: StepContext) -> LossOutput:
        assert ctx.teacher is not None
        target = ctx.teacher.image["global"].masked_tokens
        assert target is not None
        return LossOutput(terms={"l2": (ctx.student.heads["predictor"]["masked"] - target).square().mean()})


class Decoder(Head):
    """A captioner's: each text's next token from the picture and the token, of views that no tower reads."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.vocabulary = spec.vocab_size
        self.words = nn.Embedding(spec.vocab_size, spec.embed_dim)
        self.out = nn.Linear(spec.embed_dim, spec.vocab_size)

    def outputs(self) -> Mapping[str, int]:
        return {"logits": self.vocabulary}

    def requires(self, outputs: Collection[str]) -> Sequence[Need]:
        return [Need(**IMAGE), Need(modality="text", group="global", kind="views")]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        image = features.image["global"].projected
        assert image is not None
        return {"logits": self.out(self.words(views.text["global"].tokens) + image[:1, :, None])}  # [V, B, S, width]

    def respond(self, *args: Any, **kwargs: Any) -> HeadOutput:
        return {"logits": self.out(self.words(args[0]))}


class Caption(Loss):
    """The cross-entropy of the next token."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()

    def requires(self) -> Sequence[Need]:
        return [Need(head="decoder"), Need(modality="text", group="global", kind="views")]

    def forward(self, ctx: StepContext) -> LossOutput:
        logits, tokens = ctx.student.heads["decoder"]["logits"][:, :, :-1], ctx.views.text["global"].tokens[:, :, 1:]
        return LossOutput(terms={"next": nn.functional.cross_entropy(logits.flatten(0, 2).float(), tokens.flatten())})


def test_a_predictor_of_what_is_left_out_trains() -> None:
    around = {"heads": {"predictor": {"type": Predictor}}}
    testing.check_loss(Jepa, around=around)
    testing.check_head(Predictor)


def captioner(**changes: Any) -> Any:
    tree = {
        "model": {"text": None},
        "heads": {"cross": None, "decoder": {"type": Decoder}},
        "losses": {"clip": None, "caption": {"type": Caption}},
        "teacher": {"type": "none"},
    }
    return testing.example_config(tree, changes)


def test_a_captioner_needs_no_text_tower() -> None:
    made = example_assembly(captioner())
    assert set(made.model.towers) == {"image"} and made.plan.views == {"text"} and not made.plan.student.text
    views = example_views(made.spec)
    whole = Gradients(made)(views, PROGRESS)
    gradient = made.model.heads["decoder"].out.weight.grad.clone()
    parts = Gradients(made, micro_batch_size=2)(views, PROGRESS)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(made.model.heads["decoder"].out.weight.grad, gradient)
    with pytest.raises(
        ConfigError, match=r"augmenters\.text: nothing reads its views: give model\.text, or augmenters"
    ):
        Builder(
            captioner(heads={"decoder": None}, losses={"caption": None, "reads": {"type": reader(UNSAID)}})
        ).assemble("check")


def test_a_head_on_the_teachers_features_alone_is_not_trained() -> None:
    tree = {"heads": {"decoder": {"type": Decoder}}}
    reads = [Need(head="decoder", role="teacher"), UNSAID]
    made = example_assembly(testing.example_config(tree, {"losses": {"l": {"type": reader(*reads)}}}))
    made.start_teacher()
    Gradients(made)(example_views(made.spec), PROGRESS)
    assert "decoder" not in made.plan.student.heads
    assert not any(p.requires_grad for p in made.model.heads["decoder"].parameters())


def test_every_group_by_its_star_too() -> None:
    plan = assembly([Need(modality="text", group=ALL, kind="views")]).plan
    assert plan.views == {"text"}
