"""From a config to objects, in one pass: its parts are imported, their options checked, and all is built and wired."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cosmos_ssl import registry
from cosmos_ssl.api import (
    Augmenter,
    Callback,
    Curve,
    Dataset,
    Evaluator,
    Head,
    Loss,
    Modality,
    Part,
    Spec,
    Teacher,
    Tokenizer,
    Tower,
    ViewSpec,
    Writer,
)
from cosmos_ssl.build.weights import start_from
from cosmos_ssl.config import LoadedConfig, part_paths
from cosmos_ssl.engine.assembly import Assembly, ScheduledEvaluator
from cosmos_ssl.errors import ConfigError, CosmosError, DataError, PluginError, first_line
from cosmos_ssl.identity import fingerprint
from cosmos_ssl.marks import Mark
from cosmos_ssl.models.adapters import add_adapters
from cosmos_ssl.models.contract import blaming, checked_offers, checked_sizes, checked_tower, checked_widths
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import make_plan

log = logging.getLogger(__name__)

PRETRAINED = "model.pretrained"
MAX_PARAMETERS = 10**11
"""Of one part."""
MAX_PIXELS = 1 << 26
"""Of all views of one sample together."""

Mode: TypeAlias = Literal["check", "prepare", "measure", "train"]
"""What all parts of a run are built for. ``check`` and ``prepare`` build the model on the meta device, without memory;
``prepare`` and ``train`` write or index the data and look for those of evaluators, the others do not look at them.
"""
READING = ("towers", "tokenizers", "heads", "losses", "teachers")
"""The groups of the parts that ``Builder.for_reading`` knows: a model that only encodes."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A part that the config names: its class, and its options in the constructor's types."""

    path: str
    record: registry.Record
    cls: type[Any]
    options: Mapping[str, Any]
    curves: Mapping[str, tuple[Curve[float], Chosen]] = field(default_factory=dict)
    """Of each option that is a curve, it and the schedule that it follows."""

    @property
    def source(self) -> str:
        """The part's name, and its package with the version (a class that was given in Python has none)."""
        given = self.record.distribution == registry.CODE
        return f"the class {self.record.name}" if given else f"'{self.record.name}' of {self.record.source}"

    def make(self, spec: Spec, name: str) -> Any:
        """Build the part. ValueError is the user's; anything else is the plugin's fault, and named as such."""
        for option, (curve, schedule) in self.curves.items():
            try:
                curve.follow(schedule.make(spec, option))
            except ValueError as error:
                raise ValueError(f"{option}.{error}") from error
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

    def __init__(
        self, loaded: LoadedConfig, groups: Collection[str] = tuple(registry.GROUPS), *, trust_code: bool = True
    ) -> None:
        """Import the parts of ``groups`` and check their options. Raises ConfigError with every fault.

        ``trust_code``: also import classes that no installed package offers (``python:MODULE.CLASS``).
        """
        self.loaded = loaded
        self.config = loaded.config
        self.trust_code = trust_code
        self.chosen: dict[str, Chosen] = {}
        faults: list[str] = []
        for path, group, keys in part_paths(loaded.tree):
            if group not in groups or path in loaded.absent:
                continue
            given = {key: value for key, value in keys.items() if key not in registry.GROUPS[group].reserved}
            chosen = self._choose(path, group, keys["type"], given, faults)
            if chosen is not None:
                own: dict[str, Any] = {}
                if group == "optimizers":
                    own = {"weight_decay": self.config.optimizer.weight_decay}
                elif group == "losses":
                    own = {"loss_weight": self.config.losses[path.removeprefix("losses.")].loss_weight}
                self.chosen[path] = replace(chosen, curves=self._curves(path, {**chosen.options, **own}, faults))
        if faults:
            raise ConfigError(faults)

    def _choose(self, path: str, group: str, name: str, given: Mapping[str, Any], faults: list[str]) -> Chosen | None:
        """A part, imported, whose options are in its constructor's types; what is wrong goes into ``faults``."""
        try:
            record = registry.find(group, name)
            cls = registry.load(record, trust_code=self.trust_code)
            options, wrong = registry.check_options(record, cls, given)
        except PluginError as error:
            faults.append(self.loaded.fault(f"{path}.type", str(error)))
            return None
        faults += [self.loaded.fault(f"{path}.{key}" if key else path, message) for key, message in wrong]
        return Chosen(path, record, cls, options)

    def _curves(
        self, path: str, options: Mapping[str, Any], faults: list[str]
    ) -> dict[str, tuple[Curve[float], Chosen]]:
        """The options that are curves, with their schedules."""
        found: dict[str, tuple[Curve[float], Chosen]] = {}
        for name, value in options.items():
            if isinstance(value, Curve):
                own = self._choose(f"{path}.{name}", "schedules", value.type, value.model_extra or {}, faults)
                found |= {name: (value, own)} if own is not None else {}
        return found

    # ------------------------------------------------------------------ what a config is built for

    def assemble(self, mode: Mode, *, watched: Callable[[], AbstractContextManager[object]] = nullcontext) -> Assembly:
        """Build and wire all parts of a run. ``watched`` is entered while data are prepared.

        Raises ConfigError with all faults of a layer.
        """
        config = self.config
        place = meta_device if mode in ("check", "prepare") else nullcontext
        prepare = mode in ("prepare", "train")
        watch = watched if prepare else nullcontext
        tokenizer, spec = self._start()
        with place():
            towers, spec = self._towers(spec)
            augmenters, spec = self._augmenters(spec)
        with watch():
            dataset, spec = self._dataset(spec, prepare=prepare)
        with place():
            model, spec = self._model(towers, spec)
        start = ""
        if config.model.pretrained is not None and mode == "train":
            start = start_from(model, config.model)
        with place():
            self._adapt(model)
        teacher: Teacher = self._make("teacher", spec)
        moving = self._layer({"optimizer": "optimizer", "schedule": "schedule"}, spec)
        heads = {name: model.head(name) for name in model.heads}
        losses = {name: model.loss(name) for name in model.losses}
        plan = make_plan(spec, towers, heads, losses)
        self._check_read(modality for modality in augmenters if modality not in towers and modality not in plan.views)
        for told in plan.warnings if mode == "train" else ():
            log.warning("%s", told)
        built: dict[str, Part] = {f"losses.{name}": loss for name, loss in losses.items()}
        built |= {"teacher": teacher, **{f"heads.{name}": head for name, head in heads.items()}}
        built |= {f"model.{modality}": tower for modality, tower in towers.items()}
        with watch():
            evaluators = self._evaluators(spec, towers, prepare=prepare)
        return Assembly(
            spec=spec,
            dataset=dataset,
            tokenizer=tokenizer,
            augmenters=augmenters,
            model=model,
            build_model=lambda: self._adapt(self._model(self._towers(spec)[0], spec, losses=False)[0]),
            teacher=teacher,
            update_when=config.teacher.update_when,
            plan=plan,
            optimizer=moving["optimizer"],
            schedule=moving["schedule"],
            loss_weights={name: part.loss_weight for name, part in config.losses.items()},
            evaluators=evaluators,
            writers=self._writers(spec) if mode != "measure" else {},
            callbacks=self._callbacks(spec, model),
            frozen=model.freeze_unread(plan),
            start=start,
            notices=_notices(built),
            parts={each.path: f"{each.record.name} ({each.record.source})" for each in self._all_chosen()},
            places=self.places,
        )

    def for_reading(self, check: Callable[[Model], None]) -> tuple[Model, Spec, Tokenizer | None]:
        """Build a model that only encodes, which ``check`` gets to see before it takes memory, and its tokenizer.

        It has all its parameters, losses' too. No data set is built, and augmenters only where a part asks for what
        they offer.
        """
        tokenizer, start = self._start()

        def build() -> tuple[Model, Spec]:
            torch.manual_seed(start.seed)
            towers, spec = self._towers(start)

            def offered() -> Spec:
                return Builder(self.loaded, ("augmenters",), trust_code=self.trust_code)._augmenters(spec)[1]

            image_views, text_views = Offers(lambda: offered().image_views), Offers(lambda: offered().text_views)
            return self._model(towers, replace(spec, image_views=image_views, text_views=text_views))

        with meta_device():
            check(build()[0])
        return *build(), tokenizer

    def for_views(self) -> tuple[Mapping[Modality, Augmenter], Spec]:
        """Build what draws the views of samples, without the model's weights and the data."""
        spec = self._start()[1]
        with meta_device():
            spec = self._towers(spec)[1]
        return self._augmenters(spec)

    def held_out(self) -> str | None:
        """Ask the data set for its held-out data (``Dataset.validation_data``), without a look at either."""
        return self._dataset(self.for_views()[1], prepare=False)[1].validation_data

    def _check_read(self, unread: Iterable[str]) -> None:
        """Raise ConfigError where there are augmenters whose views nothing reads."""
        told = "nothing reads its views: give model.{0}, or augmenters.{0}: null"
        faults = [self.loaded.fault(f"augmenters.{modality}", told.format(modality)) for modality in unread]
        if faults:
            raise ConfigError(faults)

    # ------------------------------------------------------------------ one part

    def _make(self, path: str, spec: Spec, faults: list[str] | None = None) -> Any:
        """One part, or None where the config has none; with ``faults`` a user's mistake is noted there instead of
        raised.
        """
        if path not in self.chosen:
            return None
        try:
            return self.chosen[path].make(spec, path.rpartition(".")[2])
        except ConfigError:
            raise  # located: another part's
        except PluginError as error:
            message = self.loaded.fault(f"{path}.type", str(error))
        except ValueError as error:
            message = self._option_fault(path, error)
        if faults is None:
            raise ConfigError([message])
        faults.append(message)
        return None

    def _layer(self, paths: Mapping[str, str], spec: Spec) -> dict[str, Any]:
        """Parts that do not see one another: all their faults at once."""
        faults: list[str] = []
        made = {name: self._make(path, spec, faults) for name, path in paths.items()}
        if faults:
            raise ConfigError(faults)
        return {name: part for name, part in made.items() if part is not None}

    def _option_fault(self, path: str, error: ValueError) -> str:
        """A part's own error; one that begins with ``OPTION: `` is located at that option."""
        chosen = self.chosen[path]
        key, _, rest = str(error).partition(": ")
        known = {option.name for option in registry.options_of(chosen.cls)}
        located = rest and key.partition(".")[0] in known  # a dotted key reaches into an option's value
        whose = "" if chosen.record.own else f" ({chosen.source})"
        return self.loaded.fault(f"{path}.{key}" if located else path, (rest if located else str(error)) + whose)

    # ------------------------------------------------------------------ the layers, each with what it tells the next

    def _start(self) -> tuple[Tokenizer | None, Spec]:
        """The tokenizer, and what is known without the towers; start values are drawn from here on."""
        config = self.config
        spec = Spec(
            embed_dim=config.model.embed_dim,
            batch_size=config.training.batch_size,
            epochs=config.schedule.epochs,
            seed=config.training.seed,
            attention=config.training.attention,
            kernels=config.training.kernels,
            has_teacher=self.chosen["teacher"].cls.present,
            background=config.model.background,
        )
        tokenizer: Tokenizer | None = self._make("tokenizer", spec)
        if tokenizer is not None:
            spec = replace(spec, context_length=tokenizer.context_length, vocab_size=tokenizer.vocab_size)
        torch.manual_seed(spec.seed)
        return tokenizer, spec

    def _towers(self, spec: Spec) -> tuple[dict[Modality, Tower], Spec]:
        made = cast(dict[Modality, Tower], self._layer({"image": "model.image", "text": "model.text"}, spec))
        for modality, tower in made.items():
            with blaming(tower, f"model.{modality}"):
                checked_tower(tower, modality)
        return made, replace(spec, **cast(dict[str, Any], {modality: tower.spec for modality, tower in made.items()}))

    def _augmenters(self, spec: Spec) -> tuple[dict[Modality, Augmenter], Spec]:
        made = self._layer({"image": "augmenters.image", "text": "augmenters.text"}, spec)
        wrong = [
            self.loaded.fault(f"augmenters.{modality}.type", f"'{each.part_name}' makes {each.modality} views")
            for modality, each in made.items()
            if each.modality != modality
        ]
        if wrong:
            raise ConfigError(wrong)
        offers = {}
        for modality, augmenter in made.items():
            with blaming(augmenter, f"augmenters.{modality}"):
                offers[f"{modality}_views"] = checked_offers(augmenter.offers())
        return cast(dict[Modality, Augmenter], made), replace(spec, **cast(dict[str, Any], offers))

    def _dataset(self, spec: Spec, *, prepare: bool) -> tuple[Dataset | None, Spec]:
        dataset: Dataset | None = self._make("data", spec)
        if dataset is None:
            return None, spec
        with blaming(dataset, "data"):
            if prepare:
                dataset.prepare()
                samples = int(checked_sizes(dataset.shard_sizes).sum())
                spec = replace(spec, steps_per_epoch=max(1, samples // spec.batch_size))
            return dataset, replace(spec, validation_data=dataset.validation_data)

    def _model(self, towers: Mapping[Modality, Tower], spec: Spec, *, losses: bool = True) -> tuple[Model, Spec]:
        """The model: heads in the order listed, each of which sees the outputs of those above, then losses.

        ``losses``: False for a teacher's, which has none.
        """
        heads: dict[str, Head] = {}
        spec = replace(spec, heads={})
        for name in self.config.heads:
            heads[name] = self._make(f"heads.{name}", spec)
            with blaming(heads[name], f"heads.{name}"):
                spec = replace(spec, heads={**spec.heads, name: checked_widths(heads[name].outputs())})
        paths = {name: f"losses.{name}" for name in self.config.losses if losses}
        made: dict[str, Loss] = self._layer(paths, spec)
        return Model(towers, heads, made, spec.embed_dim), spec

    def _adapt(self, model: Model) -> Model:
        """The model, with the adapters of ``model.lora``, if any. Raises ConfigError."""
        lora = self.config.model.lora
        if lora is None:
            return model
        if find_spec("peft") is None:
            raise ConfigError(
                [self.loaded.fault("model.lora", "needs Hugging Face's peft. Run: pip install 'cosmos-ssl[lora]'")]
            )
        try:
            add_adapters({str(modality): tower for modality, tower in model.towers.items()}, **lora.model_dump())
        except ValueError as error:
            option, _, told = str(error).partition(": ")
            raise ConfigError([self.loaded.fault(f"model.lora.{option}", told)]) from error
        return model

    def unadapted(self, assembly: Assembly) -> Model:
        """The model without adapters, which ``model.pretrained`` is of; on the meta device where there are any."""
        if self.config.model.lora is None:
            return assembly.model
        with meta_device():
            return self._model(self._towers(assembly.spec)[0], assembly.spec)[0]

    def make_evaluators(self, spec: Spec) -> dict[str, Evaluator]:
        """Build the evaluators, which have looked at no data yet. Raises ConfigError."""
        return self._layer({name: f"evaluators.{name}" for name in self.config.evaluators}, spec)

    def missing_data(self, evaluators: Mapping[str, Evaluator]) -> list[str]:
        """Return what evaluators do not find of their data."""
        missing = []
        for name, evaluator in evaluators.items():
            try:
                with blaming(evaluator, f"evaluators.{name}"):
                    evaluator.prepare()
            except DataError as error:
                missing.append(self._option_fault(f"evaluators.{name}", error))
        return missing

    def _evaluators(self, spec: Spec, towers: Collection[Modality], *, prepare: bool) -> dict[str, ScheduledEvaluator]:
        made = self.make_evaluators(spec)
        missing = [
            self.loaded.fault(f"evaluators.{name}.type", f"needs model.{modality}, which the config does not have")
            for name, evaluator in made.items()
            for modality in evaluator.modalities
            if modality not in towers
        ]
        missing += self.missing_data(made) if prepare else []
        if missing:
            raise ConfigError(missing)
        return {
            name: ScheduledEvaluator(evaluator=each, every_epochs=self.config.evaluators[name].every_epochs)
            for name, each in made.items()
        }

    def _writers(self, spec: Spec) -> dict[str, Writer]:
        return self._layer({name: f"logging.writers.{name}" for name in self.config.logging.writers}, spec)

    def _callbacks(self, spec: Spec, model: Model) -> dict[str, Callback]:
        """The callbacks, which have found in the model what they name."""
        made: dict[str, Callback] = self._layer({name: f"callbacks.{name}" for name in self.config.callbacks}, spec)
        faults = []
        for name, callback in made.items():
            with blaming(callback, f"callbacks.{name}"):
                try:
                    callback.prepare(model)
                except ValueError as error:
                    faults.append(self._option_fault(f"callbacks.{name}", error))
        if faults:
            raise ConfigError(faults)
        return made

    # ------------------------------------------------------------------ what is asked of what was built

    def _all_chosen(self) -> Iterator[Chosen]:
        """The parts, and the schedules that their options follow."""
        for chosen in self.chosen.values():
            yield chosen
            yield from (schedule for _, schedule in chosen.curves.values())

    def places(self) -> dict[str, str | None]:
        """Read what lies at the places that options name; None for options that are no part of a run
        (``identity.Identity``).
        """
        found: dict[str, str | None] = {}
        for path, chosen in self.chosen.items():
            for name, mark in registry.marks(chosen.record.group, chosen.cls).items():
                value = chosen.options.get(name)
                if mark is Mark.ASIDE or chosen.record.group == "datasets":  # the data set tells what it holds
                    found[f"{path}.{name}"] = None
                elif value is not None and chosen.record.group not in ("evaluators", "writers"):
                    found[f"{path}.{name}"] = fingerprint(value)
            if chosen.record.group == "callbacks" and chosen.cls.watches:
                found[path] = None
        pretrained = self.config.model.pretrained
        if pretrained is not None:
            found[PRETRAINED if pretrained.parts is None else f"{PRETRAINED}.from"] = fingerprint(pretrained.source)
        return found

    def check_sizes(self, assembly: Assembly) -> None:
        """Raise ConfigError for parts and views that no machine holds, views that a tower cannot encode, heads without
        samples to mix.
        """
        spec, model, faults = assembly.spec, assembly.model, []
        parts: dict[str, nn.Module] = {f"model.{modality}": tower for modality, tower in model.towers.items()}
        parts |= {f"heads.{name}": head for name, head in model.heads.items()}
        parts |= {f"losses.{name}": loss for name, loss in model.losses.items()}
        for path, part in parts.items():
            count = sum(parameter.numel() for parameter in part.parameters())
            if count > MAX_PARAMETERS:
                faults.append(self.loaded.fault(path, f"{count:,} parameters, at most {MAX_PARAMETERS:,} can be"))
        faults += [
            self.loaded.fault(f"heads.{name}", "mixes samples, and training.batch_size is 1. Take at least 2")
            for name in assembly.plan.student.heads
            if model.head(name).mixes_samples and spec.batch_size < 2
        ]
        for modality, tower in model.towers.items():
            views = spec.views(modality)
            pixels = sum(view.views * (view.size or 0) ** 2 for view in views.values())
            if pixels > MAX_PIXELS:
                faults.append(
                    self.loaded.fault(
                        f"augmenters.{modality}", f"{pixels:,} pixels of views a sample, at most {MAX_PIXELS:,} can be"
                    )
                )
            roles = filter(None, (assembly.plan.student, assembly.plan.teacher))
            read = {name for role in roles for name in role.of(modality)}
            with blaming(tower, f"model.{modality}"):
                try:
                    tower.check_inputs({name: view for name, view in views.items() if name in read})
                except ValueError as error:
                    faults.append(self._option_fault(f"model.{modality}", error))
        if faults:
            raise ConfigError(faults)


def _notices(parts: Mapping[str, Part]) -> list[str]:
    """What parts have to say of how they are set, by their places in the config."""
    found = []
    for path, part in parts.items():
        with blaming(part, path):
            told = part.notice()
        found += [f"{path}: {told}"] if told else []
    return found


class Offers(UserDict[str, ViewSpec]):
    """The views that an augmenter offers; it is built when somebody asks for them."""

    def __init__(self, ask: Callable[[], Mapping[str, ViewSpec]]) -> None:
        self._ask = ask

    @cached_property
    def data(self) -> dict[str, ViewSpec]:  # type: ignore[override]
        """What UserDict works on."""
        return dict(self._ask())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.data,)
