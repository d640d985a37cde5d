"""From a config to a running job: the named parts are imported, checked, built and wired together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cosmos_ssl import registry
from cosmos_ssl.api import Augmenter, Dataset, Evaluator, Head, Loss, Modality, Part, Spec, Teacher, Tokenizer, Tower
from cosmos_ssl.build.weights import start_from
from cosmos_ssl.config import Config, LoadedConfig, part_paths
from cosmos_ssl.engine.assembly import Assembly, ScheduledEvaluator
from cosmos_ssl.errors import ConfigError, CosmosError, DataError, PluginError, first_line
from cosmos_ssl.identity import fingerprint
from cosmos_ssl.marks import Mark
from cosmos_ssl.models.contract import blaming, checked_offers, checked_sizes, checked_tower, checked_widths
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import make_plan

MAX_PARAMETERS = 10**11
"""Of one part."""
MAX_PIXELS = 1 << 26
"""Of all views of one sample together."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A part that the config names: its class, and its options in the constructor's types."""

    path: str
    record: registry.Record
    cls: type[Any]
    options: Mapping[str, Any]

    @property
    def source(self) -> str:
        """The part's name, and its package with the version (a class that was given in Python has none)."""
        given = self.record.distribution == registry.CODE
        return f"the class {self.record.name}" if given else f"'{self.record.name}' of {self.record.source}"

    def make(self, spec: Spec, name: str) -> Any:
        """Build the part. ValueError is the user's; anything else is the plugin's fault, and named as such."""
        try:
            part = self.cls(spec, **self.options)
        except (ValueError, CosmosError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit in a constructor too
            raise PluginError(f"{self.record} failed when it was built: {first_line(error)}") from error
        part = cast(Part, part)
        part.part_name = name
        part.part_source = "" if self.record.own else self.source
        return part


class _NoDraws(TorchFunctionMode):
    """Start values need no drawing on the meta device, where the first draw would import torch's compiler (2 s)."""

    _DRAWS = frozenset({"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in self._DRAWS:
            tensor: Tensor = args[0] if args else kwargs["tensor"]  # torch.nn.init passes names
            if tensor.is_meta:
                return tensor
        return (torch.empty if func in (torch.randn, torch.rand) else func)(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules built here have shapes, and neither memory nor start values."""
    with torch.device("meta"), _NoDraws():
        yield


class Builder:
    """Builds the parts of one config, in the order of ``Spec``; faults of one stage are raised together."""

    def __init__(self, loaded: LoadedConfig, *, trust_code: bool = True) -> None:
        """``trust_code``: also import classes that no installed package offers (``python:MODULE.CLASS``)."""
        self.loaded = loaded
        self.config: Config = loaded.config
        self.trust_code = trust_code
        self.chosen = self._choose()

    # ------------------------------------------------------------------ choosing

    def _choose(self) -> dict[str, Chosen]:
        """Import the named parts and check their options. Raises ConfigError with every fault."""
        chosen: dict[str, Chosen] = {}
        faults: list[str] = []
        for path, group, keys in part_paths(self.loaded.tree):
            reserved = {"type", *registry.GROUPS[group].reserved}
            try:
                record = registry.find(group, keys["type"])
                cls = registry.load(record, trust_code=self.trust_code)
                given = {key: value for key, value in keys.items() if key not in reserved}
                options, wrong = registry.check_options(record, cls, given)
            except PluginError as error:
                faults.append(self._fault(f"{path}.type", str(error)))
                continue
            faults += [self._fault(f"{path}.{key}" if key else path, message) for key, message in wrong]
            chosen[path] = Chosen(path, record, cls, options)
        if faults:
            raise ConfigError(faults)
        return chosen

    def _fault(self, path: str, message: str) -> str:
        return self.loaded.fault(path, message)

    def _option_fault(self, path: str, error: ValueError) -> str:
        """A part's own error; one that begins with ``OPTION: `` is located at that option."""
        key, _, rest = str(error).partition(": ")
        known = {option.name for option in registry.options_of(self.chosen[path].cls)}
        located = rest and key.partition(".")[0] in known  # a dotted key reaches into an option's value
        chosen = self.chosen[path]
        whose = "" if chosen.record.own else f" ({chosen.source})"
        return self._fault(f"{path}.{key}", rest + whose) if located else self._fault(path, str(error) + whose)

    # ------------------------------------------------------------------ building

    def _make(self, path: str, spec: Spec, faults: list[str] | None = None) -> Any:
        """One part, or None where the config has none; with ``faults`` a user's mistake is noted there instead of
        raised.
        """
        if path not in self.chosen:
            return None
        chosen = self.chosen[path]
        try:
            return chosen.make(spec, path.rpartition(".")[2])
        except PluginError as error:
            message = self._fault(f"{path}.type", str(error))
        except ValueError as error:
            message = self._option_fault(path, error)
        if faults is None:
            raise ConfigError([message])
        faults.append(message)
        return None

    def assemble(
        self,
        *,
        meta: bool = False,
        prepare: bool = True,
        watched: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Assembly:
        """Build and wire everything.

        ``meta`` builds towers, heads and losses without memory (a check). ``prepare`` writes or indexes the
        data and reads its size, while ``watched`` is entered; a check, or a model without its data, does not.
        Raises ConfigError with all faults of a layer.
        """
        config = self.config
        spec = Spec(
            embed_dim=config.model.embed_dim,
            batch_size=config.training.batch_size,
            epochs=config.schedule.epochs,
            seed=config.training.seed,
            attention=config.training.attention,
            has_teacher=self.chosen["teacher"].cls.present,
            background=config.model.background,
        )
        tokenizer: Tokenizer | None = self._make("tokenizer", spec)
        if tokenizer is not None:
            spec = replace(spec, context_length=tokenizer.context_length, vocab_size=tokenizer.vocab_size)
        torch.manual_seed(spec.seed)
        with meta_device() if meta else nullcontext():
            towers = self._towers(spec)
            spec = replace(spec, **cast(dict[str, Any], {modality: tower.spec for modality, tower in towers.items()}))
            augmenters, offers = self._augmenters(spec)
            spec = replace(spec, **offers)
        with watched() if prepare else nullcontext():
            dataset, spec = self._dataset(spec, prepare)
        with meta_device() if meta else nullcontext():
            heads, spec = self._heads(spec)
            losses = self._losses(spec)
        model = Model(towers, heads, losses, spec.embed_dim)
        start = ""
        if config.model.pretrained is not None and prepare and not meta:
            start = start_from(model, config.model.pretrained, partial=config.model.pretrained_partial)
        teacher: Teacher = self._make("teacher", spec)
        plan = make_plan(spec, towers, heads, losses)
        with watched() if prepare else nullcontext():
            evaluators = self._evaluators(spec, towers, prepare)
        return Assembly(
            spec=spec,
            dataset=dataset,
            tokenizer=tokenizer,
            augmenters=augmenters,
            model=model,
            build_model=lambda: Model(self._towers(spec), self._heads(spec)[0], self._losses(spec), spec.embed_dim),
            teacher=teacher,
            update_when=config.teacher.update_when,
            plan=plan,
            loss_weights={name: part.loss_weight for name, part in config.losses.items()},
            evaluators=evaluators,
            frozen=model.freeze_unread(plan),
            start=start,
            parts={path: f"{chosen.record.name} ({chosen.record.source})" for path, chosen in self.chosen.items()},
            places=self._places,
        )

    def _dataset(self, spec: Spec, prepare: bool) -> tuple[Dataset | None, Spec]:
        """The data set, and what is known with it."""
        dataset: Dataset | None = self._make("data", spec)
        if dataset is None:
            return None, spec
        with blaming(dataset, "data"):
            if prepare:
                dataset.prepare()
                spec = replace(
                    spec, steps_per_epoch=max(1, int(checked_sizes(dataset.shard_sizes).sum()) // spec.batch_size)
                )
            return dataset, replace(spec, validation_data=dataset.validation_data)

    def _places(self) -> dict[str, str | None]:
        """What lies at the places that options name, and None for options that are no part of a run
        (``identity.Identity``).
        """
        found: dict[str, str | None] = {}
        for path, chosen in self.chosen.items():
            for name, mark in registry.marks(chosen.record.group, chosen.cls).items():
                value = chosen.options.get(name)
                if mark is Mark.ASIDE or chosen.record.group == "datasets":  # the data set tells what it holds
                    found[f"{path}.{name}"] = None
                elif value is not None and chosen.record.group != "evaluators":
                    found[f"{path}.{name}"] = fingerprint(value)
        if self.config.model.pretrained is not None:
            found["model.pretrained"] = fingerprint(self.config.model.pretrained)
        return found

    def _towers(self, spec: Spec) -> dict[Modality, Tower]:
        made = cast(dict[Modality, Tower], self._layer({"image": "model.image", "text": "model.text"}, spec))
        for modality, tower in made.items():
            with blaming(tower, f"model.{modality}"):
                checked_tower(tower, modality)
        return made

    def _augmenters(self, spec: Spec) -> tuple[dict[Modality, Augmenter], dict[str, Any]]:
        """The augmenters, and what they offer as fields of ``Spec``."""
        made = self._layer({"image": "augmenters.image", "text": "augmenters.text"}, spec)
        wrong = [
            self._fault(f"augmenters.{modality}.type", f"'{augmenter.part_name}' makes {augmenter.modality} views")
            for modality, augmenter in made.items()
            if augmenter.modality != modality
        ]
        if wrong:
            raise ConfigError(wrong)
        offers = {}
        for modality, augmenter in made.items():
            with blaming(augmenter, f"augmenters.{modality}"):
                offers[f"{modality}_views"] = checked_offers(augmenter.offers())
        return cast(dict[Modality, Augmenter], made), offers

    def check_sizes(self, assembly: Assembly) -> None:
        """Raise ConfigError for parts and views that no machine holds, views that a tower cannot encode, heads without
        samples to mix.
        """
        spec, model, faults = assembly.spec, assembly.model, []
        parts: dict[str, nn.Module] = {f"model.{modality}": tower for modality, tower in model.towers.items()}
        parts |= {f"heads.{name}": model.head(name) for name in model.heads} | {
            f"losses.{name}": model.loss(name) for name in model.losses
        }
        for path, part in parts.items():
            count = sum(parameter.numel() for parameter in part.parameters())
            if count > MAX_PARAMETERS:
                faults.append(self._fault(path, f"{count:,} parameters, at most {MAX_PARAMETERS:,} can be"))
        mixing = [
            name for name in assembly.plan.student.heads if model.head(name).mixes_samples and spec.batch_size < 2
        ]
        faults += [
            self._fault(f"heads.{name}", "mixes samples, and training.batch_size is 1. Take at least 2")
            for name in mixing
        ]
        for modality, tower in model.towers.items():
            views = spec.views(modality)
            pixels = sum(view.views * (view.size or 0) ** 2 for view in views.values())
            if pixels > MAX_PIXELS:
                faults.append(
                    self._fault(
                        f"augmenters.{modality}", f"{pixels:,} pixels of views a sample, at most {MAX_PIXELS:,} can be"
                    )
                )
            read = {
                name
                for role in (assembly.plan.student, assembly.plan.teacher)
                if role is not None
                for name in role.of(modality)
            }
            with blaming(tower, f"model.{modality}"):
                try:
                    tower.check_inputs({name: view for name, view in views.items() if name in read})
                except ValueError as error:
                    faults.append(self._option_fault(f"model.{modality}", error))
        if faults:
            raise ConfigError(faults)

    def _heads(self, spec: Spec) -> tuple[dict[str, Head], Spec]:
        """The heads in the order listed; each sees the outputs of those above."""
        heads: dict[str, Head] = {}
        spec = replace(spec, heads={})
        for name in self.config.heads:
            heads[name] = self._make(f"heads.{name}", spec)
            with blaming(heads[name], f"heads.{name}"):
                spec = replace(spec, heads={**spec.heads, name: checked_widths(heads[name].outputs())})
        return heads, spec

    def _losses(self, spec: Spec) -> dict[str, Loss]:
        return cast(dict[str, Loss], self._layer({name: f"losses.{name}" for name in self.config.losses}, spec))

    def make_evaluators(self, spec: Spec) -> dict[str, Evaluator]:
        """The evaluators, which have looked at no data yet. Raises ConfigError."""
        return cast(
            dict[str, Evaluator], self._layer({name: f"evaluators.{name}" for name in self.config.evaluators}, spec)
        )

    def _evaluators(self, spec: Spec, towers: Mapping[Modality, Tower], prepare: bool) -> dict[str, ScheduledEvaluator]:
        made = self.make_evaluators(spec)
        missing = [
            self._fault(f"evaluators.{name}.type", f"needs model.{modality}, which the config does not have")
            for name, evaluator in made.items()
            for modality in evaluator.modalities
            if modality not in towers
        ]
        missing += self.missing_data(made) if prepare else []
        if missing:
            raise ConfigError(missing)
        return {
            name: ScheduledEvaluator(evaluator=e, every_epochs=self.config.evaluators[name].every_epochs)
            for name, e in made.items()
        }

    def missing_data(self, evaluators: Mapping[str, Evaluator]) -> list[str]:
        """What evaluators do not find of their data."""
        missing = []
        for name, evaluator in evaluators.items():
            try:
                with blaming(evaluator, f"evaluators.{name}"):
                    evaluator.prepare()
            except DataError as error:
                missing.append(self._option_fault(f"evaluators.{name}", error))
        return missing

    def _layer(self, paths: Mapping[str, str], spec: Spec) -> dict[str, Any]:
        """Parts that do not see one another: all their faults at once."""
        faults: list[str] = []
        made = {name: self._make(path, spec, faults) for name, path in paths.items()}
        if faults:
            raise ConfigError(faults)
        return {name: part for name, part in made.items() if part is not None}
