"""The sections of a config: every key with its type and default. Options of parts are not here: they are the
arguments of the part's constructor.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from cosmos_ssl.bounds import Count, Curve, Few, Share, Size, Strength, Whole
from cosmos_ssl.pictures import BACKGROUND, is_colour


def _colour(name: str) -> str:
    if not is_colour(name):
        raise PydanticCustomError("wanted", "{wanted}", {"wanted": "a colour, such as white or '#ffa500'"})
    return name


def _part_name(name: str) -> str:
    if not re.fullmatch(r"image|text|(heads|losses)(\.[\w-]+)?", name):
        wanted = "image, text, heads, losses, or one of these, such as heads.cross"
        raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
    return name


PartName = Annotated[str, AfterValidator(_part_name)]
Colour = Annotated[str, AfterValidator(_colour)]
Minutes = Annotated[float, Field(ge=1e-3, le=1e6)]


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, numbers are finite and not made from strings."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Part(BaseModel):
    """One part: ``type`` picks it, the other keys are its options."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    type: str

    @property
    def options(self) -> dict[str, Any]:
        """All keys but ``type``; reserved keys of the subclasses are fields and left out too."""
        return dict(self.model_extra or {})


Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class LossPart(Part):
    """A loss and its weight in the total, which may move over the run."""

    loss_weight: Weight | Curve[Weight] = 1.0


class TeacherPart(Part):
    """A teacher and when it moves."""

    update_when: Literal["before_optimizer_step", "after_optimizer_step"] = "after_optimizer_step"


class EvaluatorPart(Part):
    """An evaluator and how often it runs; it always runs at the end."""

    every_epochs: Count | None = None


def _or_its_name(schema: dict[str, Any]) -> None:
    """Say in a JSON Schema that the name alone will do."""
    mapping = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string", "minLength": 1}, mapping]


class PretrainedConfig(Section):
    """What a model starts from: a run folder, a checkpoint, an official file or an OpenCLIP model.

    ``parts``: what is taken of it, whole: ``image``, ``text``, ``heads``, ``losses``, or one of them, as
    ``heads.cross`` (default: the towers that the model has). All else starts anew. The name alone stands for
    ``{from: NAME}``.
    """

    model_config = ConfigDict(json_schema_extra=_or_its_name)

    source: Annotated[str, Field(min_length=1, alias="from")]
    parts: Annotated[list[PartName], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, given: Any) -> Any:
        return {"from": given} if isinstance(given, str) else given

    @model_serializer
    def _as_given(self) -> str | dict[str, Any]:
        return self.source if self.parts is None else {"from": self.source, "parts": list(self.parts)}


class LoraConfig(Section):
    """Low-rank adapters on the towers' linear maps (LoRA, arXiv 2106.09685), by peft; the towers' own weights rest.

    A map's output has ``alpha`` / ``rank`` B A x added, A and B of this rank. ``dropout``: share of x that A does not
    see in training. ``rslora``: ``alpha`` / sqrt(``rank``) is the factor instead (rsLoRA, arXiv 2312.03732). ``match``:
    patterns of the maps that get one, over full names such as ``image.blocks.0.attn.qkv``. ``train``: patterns of
    towers' parameters that are trained beside them.
    """

    rank: Size = 16
    alpha: Strength = 16.0
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    match: Annotated[list[str], Field(min_length=1)] = ["*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2"]
    train: list[str] = []


class ModelConfig(Section):
    """The towers, and what they start from. ``pretrained_partial``: of ``pretrained`` take what fits.

    ``background`` is what transparent pictures are put on, by name or as '#rrggbb'.
    """

    embed_dim: Size = 512
    image: Part | None = None
    text: Part | None = None
    pretrained: PretrainedConfig | None = None
    pretrained_partial: bool = False
    lora: LoraConfig | None = None
    background: Colour = BACKGROUND


class AugmentersConfig(Section):
    """One augmenter a modality."""

    image: Part | None = None
    text: Part | None = None


class LoaderConfig(Section):
    """Order and reading of samples. ``lanes`` and ``shuffle_samples`` are part of the run.

    A run whose shards have changed is refused; with ``changed_data: accept`` it goes on at the same step, in the order
    and with the epochs of what is there now.
    """

    workers: Annotated[int, Field(ge=0, le=1024)] = 8
    lanes: Size | None = None
    shuffle_samples: Count = 262_144
    prefetch: Few = 2
    error_budget: Share = 0.01
    changed_data: Literal["refuse", "accept"] = "refuse"


class RuleConfig(Section):
    """A parameter rule: ``match`` is an fnmatch pattern over full names (``image.blocks.0.*``).

    A later rule overrides the keys that it gives. ``lr_scale`` and ``weight_decay_scale`` multiply the run's learning
    rate and weight decay. ``decay_1d``: parameters with fewer than two dimensions decay, too. ``frozen_epochs``: no
    update before this epoch. ``frozen``: none at all.
    """

    match: str
    lr_scale: Strength | None = None
    weight_decay_scale: Strength | None = None
    decay_1d: bool | None = None
    frozen: bool = False
    frozen_epochs: Strength | None = None


def _by_name(rules: Any) -> Any:
    """A list of rules, as configs before version 0.2 have it, by number."""
    return {str(number): rule for number, rule in enumerate(rules)} if isinstance(rules, list) else rules


class OptimizerConfig(Part):
    """What is the engine's of an optimiser: learning rate, and decay of parameters with two dimensions or more.

    ``rules``: parameter rules by name. They apply in this order.
    """

    type: str = "adamw"
    lr: Annotated[float, Field(gt=0, le=1000)] = 5e-4
    weight_decay: Strength | Curve[Strength] = 0.5
    weight_decay_end: Strength | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    rules: Annotated[dict[str, RuleConfig], BeforeValidator(_by_name)] = {}

    @model_validator(mode="before")
    @classmethod
    def _adamw(cls, tree: Any) -> Any:
        """AdamW's defaults are written into every config, and so into identities, since it was the only optimiser."""
        if not isinstance(tree, dict) or tree.get("type", "adamw") != "adamw":
            return tree
        defaults = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8}
        return defaults | {key: value for key, value in tree.items() if value is not None or key not in defaults}


class ScheduleConfig(Part):
    """The run's length, and its learning rate: a linear warm-up, then the schedule's way to ``final_lr``.

    The warm-up starts at ``warmup_start_lr``.
    """

    type: str = "cosine"
    epochs: Count = 32
    max_steps: Count | None = None
    warmup_steps: Whole = 2000
    warmup_start_lr: Strength = 0.0
    final_lr: Strength = 0.0


class RollbackConfig(Section):
    """When a loss has risen for good: its median over the last ``patience`` steps lies above ``factor`` times the one
    over the four times as many before. The run then goes back, ``most`` times at most.
    """

    factor: Annotated[float, Field(gt=1, le=1e6)] = 1.5
    patience: Annotated[int, Field(ge=2, le=10_000)] = 100
    most: Annotated[int, Field(ge=1, le=1000)] = 5


class TrainingConfig(Section):
    """The step. ``batch_size`` is global; ``trace_steps`` steps near the start are traced into ``RUN/trace``.

    ``precision: auto`` is amp_fp16 on CUDA, fp32 elsewhere, and in a run that was begun in another one, that.
    ``attention: auto`` is xformers where it runs, else varlen where that does, else sdpa. ``deterministic``: the same
    bits again from the same machine and number of ranks, on CUDA with any attention but xformers, whose backward pass
    adds up as it comes. ``average_in: bf16`` halves what ranks send of gradients; each sum of two is then rounded to 8
    bits. ``kernels: auto`` computes photometric work and, in 16 bits, the transformer by Triton kernels where these run
    on a CUDA device; ``plain`` leaves both to PyTorch's. ``compile`` fuses what towers' blocks compute elementwise,
    once for all lengths; that it gains time is not yet measured on a card, so it is off unless asked for.
    ``parallel``: every rank holds all of student, teacher and optimiser (``replicate``); or all ranks share one copy of
    the towers and of what is held for them (``fsdp``), or each ``parallel_shards`` ranks do (``hsdp``; by default those
    of a node).
    ``clip_grad_norm``: largest norm of the gradients. ``clip_grad_per``: of the whole ``model``, of each ``module``
    (towers, heads and losses) or of each ``parameter``. ``rollback``: whether a run goes back where its loss has risen.
    """

    batch_size: Annotated[int, Field(gt=0, le=1 << 20)] = 1024
    micro_batch_size: Count | None = None
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"] = "auto"
    average_in: Literal["fp32", "bf16"] = "fp32"
    attention: Literal["auto", "xformers", "varlen", "sdpa"] = "auto"
    kernels: Literal["auto", "plain"] = "auto"
    compile: bool = False
    parallel: Literal["replicate", "fsdp", "hsdp"] = "replicate"
    parallel_shards: Count | None = None
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    clip_grad_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    clip_grad_per: Literal["model", "module", "parameter"] = "model"
    max_nonfinite_steps: Count = 20
    rollback: RollbackConfig | None = None
    timeout_minutes: Minutes | None = 30.0
    trace_steps: Annotated[int, Field(ge=0, le=1024)] = 0


class CheckpointsConfig(Section):
    """When checkpoints are written and which are kept; one is always written when leaving.

    One that is due by ``every_steps`` is always written: where an older one is still being written, the run waits.
    ``on_failure``: what a run does when one cannot be written (a full disk): go on with the older one, or end.
    ``copy_to``: an fsspec URL to which each is copied, such as ``s3://bucket/run``; a run whose folder has none as new
    goes on from there. ``shards``: so many files a role, with an index beside them; of ranks that share weights each
    then writes its own. ``auto``: several of 4 GiB where a role has more than 32, or where a host could not hold all.
    """

    every_minutes: Minutes | None = 30.0
    every_steps: Count | None = None
    keep_last: Count = 2
    keep_every_epochs: Count | None = None
    on_failure: Literal["continue", "stop"] = "continue"
    copy_to: Annotated[str, Field(min_length=1)] | None = None
    shards: Annotated[int, Field(gt=0, le=9_999)] | Literal["auto"] = 1


class LoggingConfig(Section):
    """Console, ``metrics.jsonl``, pictures and TensorBoard, and other ``writers``: parts by name."""

    every_steps: Count = 20
    tensorboard: bool = True
    writers: dict[str, Part] = {}


class Config(Section):
    """A whole run."""

    name: str = "run"
    output_dir: str | None = None
    model: ModelConfig = ModelConfig()
    tokenizer: Part | None = None
    augmenters: AugmentersConfig = AugmentersConfig()
    heads: dict[str, Part] = {}
    losses: dict[str, LossPart] = {}
    teacher: TeacherPart = TeacherPart(type="none")
    data: Part | None = None
    loader: LoaderConfig = LoaderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    evaluators: dict[str, EvaluatorPart] = {}
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    logging: LoggingConfig = LoggingConfig()
    callbacks: dict[str, Part] = {}
    profile: str | None = None

    @property
    def folder(self) -> Path:
        """The run folder: ``output_dir``, or ``runs/NAME``."""
        return Path(self.output_dir or f"runs/{self.name}")

    @property
    def lanes(self) -> int:
        """The lanes of the order of samples."""
        return self.loader.lanes or default_lanes(self.training.batch_size)


def default_lanes(batch_size: int) -> int:
    """``loader.lanes`` where it is not given: the largest divisor of the batch up to 256."""
    return max(n for n in range(1, 257) if batch_size % n == 0)
