"""From a config to a running job: the named parts are imported, checked, built and wired together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from cosmos_ssl import registry
from cosmos_ssl.api import Augmenter, Dataset, Evaluator, Head, Loss, Modality, Part, Spec, Teacher, Tokenizer, Tower
from cosmos_ssl.config import Config, LoadedConfig, load_config
from cosmos_ssl.config import Part as PartConfig
from cosmos_ssl.engine.assembly import Assembly, ScheduledEvaluator
from cosmos_ssl.errors import ConfigError, CosmosError, PluginError
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import make_plan

if TYPE_CHECKING:
    from cosmos_ssl.models.encoder import ModelEncoder


@dataclass(frozen=True, slots=True)
class Chosen:
    """A part that the config names: its class, and its options in the constructor's types."""

    path: str
    record: registry.Record
    cls: type[Any]
    options: Mapping[str, Any]

    def make(self, spec: Spec, name: str) -> Any:
        """Build the part. ValueError is the user's; anything else is the plugin's fault, and named as such."""
        try:
            part = self.cls(spec, **self.options)
        except (ValueError, CosmosError):
            raise
        except Exception as error:
            raise PluginError(f"{self.record} failed when it was built: {registry.first_line(error)}") from error
        cast(Part, part).part_name = name
        return part


class Builder:
    """Builds the parts of one config, in the order of ``Spec``; faults of one stage are raised together."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self.loaded = loaded
        self.config: Config = loaded.config
        self.chosen = self._choose()

    # ------------------------------------------------------------------ choosing

    def _choose(self) -> dict[str, Chosen]:
        """Import the named parts and check their options. Raises ConfigError with every fault."""
        chosen: dict[str, Chosen] = {}
        faults: list[str] = []
        for path, group, part in self._named():
            try:
                record = registry.find(group, part.type)
                cls = registry.load(record)
                options, wrong = registry.check_options(record, cls, part.options)
            except PluginError as error:
                faults.append(self._fault(f"{path}.type", str(error)))
                continue
            faults += [self._fault(f"{path}.{key}" if key else path, message) for key, message in wrong]
            chosen[path] = Chosen(path, record, cls, options)
        if faults:
            raise ConfigError(faults)
        return chosen

    def _named(self) -> Iterator[tuple[str, str, PartConfig]]:
        """(key path, registry group, part) of every part in the config."""
        config = self.config
        single = [
            ("data", "datasets", config.data),
            ("tokenizer", "tokenizers", config.tokenizer),
            ("model.image", "towers", config.model.image),
            ("model.text", "towers", config.model.text),
            ("augmenters.image", "augmenters", config.augmenters.image),
            ("augmenters.text", "augmenters", config.augmenters.text),
            ("teacher", "teachers", config.teacher),
        ]
        yield from ((path, group, part) for path, group, part in single if part is not None)
        for group in ("heads", "losses", "evaluators"):
            for name, part in getattr(config, group).items():
                yield f"{group}.{name}", group, part

    def _fault(self, path: str, message: str) -> str:
        return self.loaded.fault(path, message)

    # ------------------------------------------------------------------ building

    def _make(self, path: str, spec: Spec, faults: list[str] | None = None) -> Any:
        """One part, or None where the config has none; with ``faults`` a user's mistake is noted there instead of raised."""
        if path not in self.chosen:
            return None
        chosen = self.chosen[path]
        try:
            return chosen.make(spec, path.rpartition(".")[2])
        except PluginError as error:
            message = self._fault(f"{path}.type", str(error))
        except ValueError as error:
            key, _, rest = str(error).partition(": ")
            inside = rest and key.split(".")[0] in chosen.options | self.config_options(path)
            message = self._fault(f"{path}.{key}", rest) if inside else self._fault(path, str(error))
        if faults is None:
            raise ConfigError([message])
        faults.append(message)
        return None

    def config_options(self, path: str) -> dict[str, Any]:
        """Every option that the part at ``path`` has, given or not."""
        return dict.fromkeys(option.name for option in registry.options(self.chosen[path].cls))

    def assemble(self, *, meta: bool = False, prepare: Callable[[Dataset], None] | None = None) -> Assembly:
        """Build and wire everything.

        ``meta`` builds towers, heads and losses without memory and touches no data (a check). ``prepare`` is
        called with the data set before its size is read. Raises ConfigError with all faults of a layer.
        """
        config = self.config
        spec = Spec(
            embed_dim=config.model.embed_dim,
            batch_size=config.training.batch_size,
            epochs=config.schedule.epochs,
            seed=config.training.seed,
            attention=config.training.attention,
            has_teacher=self.chosen["teacher"].cls.present,
        )
        dataset: Dataset = self._make("data", spec)
        if not meta:
            (prepare or type(dataset).prepare)(dataset)
            spec = replace(spec, steps_per_epoch=max(1, int(dataset.shard_sizes.sum()) // spec.batch_size))
        spec = replace(spec, validation_data=dataset.validation_data)
        tokenizer: Tokenizer | None = self._make("tokenizer", spec)
        if tokenizer is not None:
            spec = replace(spec, context_length=tokenizer.context_length, vocab_size=tokenizer.vocab_size)
        torch.manual_seed(spec.seed)
        with torch.device("meta") if meta else nullcontext():
            towers = self._towers(spec)
            spec = replace(spec, **cast(dict[str, Any], {modality: tower.spec for modality, tower in towers.items()}))
            augmenters = self._augmenters(spec)
            views = {f"{modality}_views": augmenter.offers() for modality, augmenter in augmenters.items()}
            spec = replace(spec, **cast(dict[str, Any], views))
            heads, spec = self._heads(spec)
            losses = self._losses(spec)
        model = Model(towers, heads, losses)
        teacher: Teacher = self._make("teacher", spec)
        plan = make_plan(spec, towers, heads, losses)
        return Assembly(
            spec=spec,
            dataset=dataset,
            tokenizer=tokenizer,
            augmenters=augmenters,
            model=model,
            build_model=lambda: Model(self._towers(spec), self._heads(spec)[0], self._losses(spec)),
            teacher=teacher,
            update_when=config.teacher.update_when,
            plan=plan,
            loss_weights={name: part.loss_weight for name, part in config.losses.items()},
            evaluators=self._evaluators(spec, towers),
            frozen=model.freeze_unread(plan),
            parts={path: f"{chosen.record.name} ({chosen.record.source})" for path, chosen in self.chosen.items()},
        )

    def _towers(self, spec: Spec) -> dict[Modality, Tower]:
        return cast(dict[Modality, Tower], self._layer({"image": "model.image", "text": "model.text"}, spec))

    def _augmenters(self, spec: Spec) -> dict[Modality, Augmenter]:
        made = self._layer({"image": "augmenters.image", "text": "augmenters.text"}, spec)
        wrong = [
            self._fault(f"augmenters.{modality}.type", f"'{augmenter.part_name}' makes {augmenter.modality} views")
            for modality, augmenter in made.items()
            if augmenter.modality != modality
        ]
        if wrong:
            raise ConfigError(wrong)
        return cast(dict[Modality, Augmenter], made)

    def _heads(self, spec: Spec) -> tuple[dict[str, Head], Spec]:
        """The heads in the order listed; each sees the outputs of those above."""
        heads: dict[str, Head] = {}
        spec = replace(spec, heads={})
        for name in self.config.heads:
            heads[name] = self._make(f"heads.{name}", spec)
            spec = replace(spec, heads={**spec.heads, name: dict(heads[name].outputs())})
        return heads, spec

    def _losses(self, spec: Spec) -> dict[str, Loss]:
        return cast(dict[str, Loss], self._layer({name: f"losses.{name}" for name in self.config.losses}, spec))

    def _evaluators(self, spec: Spec, towers: Mapping[Modality, Tower]) -> dict[str, ScheduledEvaluator]:
        made = cast(dict[str, Evaluator], self._layer({name: f"evaluators.{name}" for name in self.config.evaluators}, spec))
        missing = [
            self._fault(f"evaluators.{name}.type", f"needs model.{modality}, which the config does not have")
            for name, evaluator in made.items()
            for modality in evaluator.modalities
            if modality not in towers
        ]
        if missing:
            raise ConfigError(missing)
        return {name: ScheduledEvaluator(evaluator=e, every_epochs=self.config.evaluators[name].every_epochs) for name, e in made.items()}

    def _layer(self, paths: Mapping[str, str], spec: Spec) -> dict[str, Any]:
        """Parts that do not see one another: all their faults at once."""
        faults: list[str] = []
        made = {name: self._make(path, spec, faults) for name, path in paths.items()}
        if faults:
            raise ConfigError(faults)
        return {name: part for name, part in made.items() if part is not None}


def check(loaded: LoadedConfig) -> Assembly:
    """Stage two: import the named parts, check their options and what they require, on the meta device."""
    return Builder(loaded).assemble(meta=True)


def train(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, float]:
    """Train what ``config`` says (a file, a packaged name or a mapping) and return the final metrics.

    ``overrides`` are ``key.sub=value`` strings. The same call again resumes. Raises UserError for a config,
    data or a run folder that cannot be used.
    """
    return run(load_config(config, overrides))
