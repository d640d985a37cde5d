"""The validated config tree: every section, its keys, types and defaults.

Options of parts are not here: they are the arguments of the part's constructor (see ``build``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, numbers are not made from strings."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Part(BaseModel):
    """One part: ``type`` picks it, the other keys are its options."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    type: str

    @property
    def options(self) -> dict[str, Any]:
        """All keys but ``type``; reserved keys of the subclasses are fields and left out too."""
        return dict(self.model_extra or {})


class LossPart(Part):
    """A loss and its weight in the total."""

    loss_weight: float = 1.0


class TeacherPart(Part):
    """A teacher and when it moves."""

    update_when: Literal["before_optimizer_step", "after_optimizer_step"] = "after_optimizer_step"


class EvaluatorPart(Part):
    """An evaluator and how often it runs; it always runs at the end."""

    every_epochs: Positive | None = None


class ModelConfig(Section):
    """The towers. ``pretrained`` starts them from a checkpoint."""

    embed_dim: Positive = 512
    image: Part | None = None
    text: Part | None = None
    pretrained: str | None = None


class AugmentersConfig(Section):
    """One augmenter a modality."""

    image: Part | None = None
    text: Part | None = None


class LoaderConfig(Section):
    """Order and reading of samples. ``lanes`` and ``shuffle_samples`` are part of the run."""

    workers: Annotated[int, Field(ge=0)] = 8
    lanes: Positive | None = None
    shuffle_samples: Positive = 262_144
    prefetch: Positive = 2
    error_budget: Share = 0.01


class RuleConfig(Section):
    """A parameter rule: ``match`` is an fnmatch pattern over full names (``image.blocks.0.*``)."""

    match: str
    lr_scale: float | None = None
    weight_decay_scale: float | None = None
    frozen: bool = False
    frozen_epochs: float | None = None


class OptimizerConfig(Section):
    """AdamW; no decay on parameters of fewer than two dimensions."""

    type: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 5e-4
    beta1: Share = 0.9
    beta2: Share = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.5
    weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    rules: list[RuleConfig] = []


class ScheduleConfig(Section):
    """Linear warm-up, then cosine to ``final_lr`` over all steps."""

    epochs: Positive = 32
    max_steps: Positive | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    final_lr: Annotated[float, Field(ge=0)] = 0.0


class TrainingConfig(Section):
    """The step. ``batch_size`` is global."""

    batch_size: Positive = 1024
    micro_batch_size: Positive | None = None
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    compile: bool = False
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    max_nonfinite_steps: Positive = 20


class CheckpointsConfig(Section):
    """When checkpoints are written and which are kept; one is always written when leaving."""

    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    every_steps: Positive | None = None
    keep_last: Positive = 2
    keep_every_epochs: Positive | None = None


class LoggingConfig(Section):
    """Console, ``metrics.jsonl`` and TensorBoard."""

    every_steps: Positive = 20
    tensorboard: bool = True


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
    data: Part
    loader: LoaderConfig = LoaderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    evaluators: dict[str, EvaluatorPart] = {}
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: str | None = None
