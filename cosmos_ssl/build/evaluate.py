"""``cosmos_ssl.evaluate``: a trained or released model on the data of a task; what is computed is kept until all is
done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_ssl import __version__
from cosmos_ssl.api import DataError, UserError
from cosmos_ssl.build.builder import Builder
from cosmos_ssl.build.reading import load
from cosmos_ssl.build.weights import Source, find_source, roles_of
from cosmos_ssl.config import LoadedConfig, load_config
from cosmos_ssl.data.cache import cache_root
from cosmos_ssl.engine.distributed import SHARING, World, as_run_errors, joined_world, pick_device
from cosmos_ssl.errors import CheckpointError, did_you_mean
from cosmos_ssl.evaluation.comparison import comparison
from cosmos_ssl.evaluation.feature_store import FeatureStore
from cosmos_ssl.evaluation.features import Job, digest, weights_digest
from cosmos_ssl.evaluation.suite import Item, find_all
from cosmos_ssl.evaluation.task_names import ALL
from cosmos_ssl.evaluation.tasks import TASKS, Found, Options, Task, check_model
from cosmos_ssl.liveness import OnStage
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.models.precision import DTYPES, has_fast_path, resolve_precision

_DEVICES = ("auto", "cpu", "cuda")


def _no_progress(what: str, done: int, total: int) -> None:
    pass


def evaluate(
    model: str | Path | ModelEncoder,
    task: str,
    data: str | Path | None = None,
    *,
    which: str | None = None,
    set_name: str | None = None,
    texts: str | None = None,
    label: str | None = None,
    class_names: str | Sequence[str] | None = None,
    templates: str | Sequence[str] | None = None,
    train_data: str | Path | None = None,
    k: int | None = None,
    csa: bool = True,
    max_samples: int | None = None,
    max_train_samples: int | None = None,
    allow_missing: bool = False,
    batch_size: int = 256,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    overrides: Sequence[str] = (),
    trust_code: bool = False,
    compare: Sequence[str | Path | ModelEncoder] = (),
    progress: OnStage = _no_progress,
) -> dict[str, Any]:
    """Evaluate a model on the data of a task, as ``cosmos-ssl eval`` does; the report that its ``--json`` writes.

    ``model`` is a run folder (its newest checkpoint), one of its checkpoints, an official file, a released name, an
    OpenCLIP model, or what ``load`` returns (then ``which``, ``device``, ``overrides`` and ``trust_code`` are as it
    is). ``task`` is a key of ``cosmos_ssl.evaluation.tasks.TASKS``, and its options are those of ``Options`` there;
    without ``data`` a run is evaluated on what its own evaluator of the task works on, with its options. ``which`` is
    ``student``, ``teacher``, ``both`` or the name of a callback; None takes both as far as they are there.
    ``precision`` is ``auto`` (of a run its own where this device is fast in it, else ``fp32``), ``fp32``, ``amp_bf16``
    or ``amp_fp16``.

    The task ``all`` goes through every task that the folder ``data``, or one directly below it, holds a known set of;
    ``reports`` are those of each, ``left_out`` says why others are not there, and ``metrics`` are
    ``ROLE/TASK/SET/NAME``. ``compare`` are other models that are evaluated alike: ``others`` holds their reports, and
    ``comparison`` a row for each metric whose samples can be drawn again (``evaluation.comparison``).

    The report holds ``task``, ``checkpoint``, ``roles``, ``data``, ``set``, ``samples`` (pictures that were used),
    ``precision``, ``device``, what the task says of how it was done (``templates``, ``k``, ...) and ``metrics``:
    ``ROLE/NAME`` (of a loaded model ``model/NAME``) -> share in 0..1, or rank. Under torchrun all ranks share the work
    and get it; what was ended of a checkpoint goes on. Raises UserError for what cannot be used, StorageError where
    storage or another rank is lost.
    """
    _check(task, device, precision)
    told = _given(data=data, set_name=set_name, texts=texts, label=label, class_names=class_names, templates=templates)
    told |= _given(train_data=train_data)
    if task == ALL and (of_one := [option for option in told if option != "data"]):
        raise UserError(f"--{of_one[0].replace('_', '-')}: an option of single tasks, not of --task {ALL}")
    if data is None and (task == ALL or compare):
        what = "the folder that holds the sets" if task == ALL else "what the models are compared on"
        raise UserError(f"--data: name {what}")
    told |= _given(k=k, csa=csa, max_samples=max_samples, max_train_samples=max_train_samples)
    settings = {"batch_size": batch_size, "workers": workers, "allow_missing": allow_missing, "progress": progress}

    def done(model: str | Path | ModelEncoder) -> _Done:
        if isinstance(model, ModelEncoder):
            one = {"model": lambda: _in_precision(model, precision)}
            return _run(one, "model", task, told, settings, lambda encoder, task, options: FeatureStore(None))
        source = World().run_on_first(lambda: find_source(model))  # one rank fetches; all read the same checkpoint
        source = source if source.folder is not None else find_source(model)
        roles: dict[str, Callable[[], ModelEncoder]] = {
            role: partial(_load, source, role, device, precision, overrides, trust_code)
            for role in _roles(source, which)
        }
        own = told if "data" in told else {**_evaluator_of_run(source, task, overrides, trust_code), **told}
        name = str(source) if source.folder is not None else str(model)
        return _run(roles, name, task, own, settings, partial(_store, source, overrides))

    with joined_world(device, wait=SHARING), as_run_errors():
        found = [done(one) for one in (model, *compare)]
        report, *others = [one.report for one in found]
        if compare:
            named = zip(_short_names([str(one["checkpoint"]) for one in (report, *others)]), found, strict=True)
            rows = comparison({f"{name} {role}": of for name, one in named for role, of in one.found.items()})
            report |= {
                "others": others,
                "comparison": [row._asdict() | {"set": row.set or report.get("set", "")} for row in rows],
            }
        return report


def check_evaluation(models: Sequence[str], task: str, *, device: str = "auto", precision: str = "auto") -> None:
    """Raise what ``evaluate`` would of what can be seen before a model is read; what is fetched is kept."""
    _check(task, device, precision)
    for model in models:
        find_source(model)


def _given(**options: Any) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items() if value is not None
    }


def _check(task: str, device: str, precision: str) -> None:
    if task not in (tasks := [*TASKS, ALL]):
        raise UserError(f"--task: no task named '{task}'.{did_you_mean(task, tasks)} Tasks: {', '.join(tasks)}")
    if device not in _DEVICES:
        raise UserError(f"--device {device}: give one of {', '.join(_DEVICES)}")
    if precision not in ("auto", *DTYPES):
        raise UserError(f"--precision {precision}: give one of auto, {', '.join(DTYPES)}")


class _Done(NamedTuple):
    """What was made of one model."""

    report: dict[str, Any]
    found: dict[str, dict[Item, Found]]
    """Role -> task and set -> what was found."""


def _run(
    roles: Mapping[str, Callable[[], ModelEncoder]],
    name: str,
    task: str,
    told: Mapping[str, Any],
    settings: Mapping[str, Any],
    store: Callable[[ModelEncoder, str, Options], FeatureStore],
) -> _Done:
    """The report of all roles, evaluated one after another."""
    if told.get("data") is None:
        raise UserError(f"--data: name what to evaluate on, since {name} does not tell it")
    items = [Item(task, None, told["data"])] if task != ALL else find_all(Path(told["data"]).expanduser())
    known = {field.name for field in fields(Options)}
    common = {option: value for option, value in told.items() if option in known}
    if task == ALL:
        options = {item: Options(**{**common, "data": str(item.folder), "set_name": item.set_name}) for item in items}
    else:
        options = {items[0]: Options(**common)}
    made: dict[Item, Task] = {}
    left_out: dict[str, str] = {}
    found: dict[str, dict[Item, Found]] = {role: {} for role in roles}
    jobs: list[Job] = []
    for role, make in roles.items():
        encoder = make()
        for item in items:
            job = Job(store=store(encoder, item.task, options[item]), max_samples=told.get("max_samples"), **settings)
            try:
                check_model(item.task, encoder)
                if item not in made:
                    made[item] = TASKS[item.task](options[item], job)
            except (DataError, UserError) as error:
                if task != ALL:
                    raise
                left_out["/".join(filter(None, item[:2]))] = str(error)
                continue
            jobs.append(job)
            found[role][item] = made[item].run(encoder, job)
    for job in jobs:
        job.store.clear()
    about = {"precision": _precision_of(encoder), "device": encoder.device.type}

    def report(item: Item) -> dict[str, Any]:
        of = {role: own[item] for role, own in found.items() if item in own}
        return {
            "task": item.task,
            "checkpoint": name,
            "roles": list(of),
            "data": options[item].data,
            "set": made[item].set_name,
            **made[item].about,
            "samples": list(of.values())[-1].samples,
            **about,
            "metrics": {f"{role}/{metric}": value for role, one in of.items() for metric, value in one.metrics.items()},
        }

    if task != ALL:
        return _Done(report(items[0]), found)
    reports = [report(item) for item in items if any(item in own for own in found.values())]
    if not reports:
        raise DataError(f"data: nothing in {told['data']} can be used: {'; '.join(left_out.values())}")
    metrics = {
        f"{role}/{one['task']}/{one['set']}/{metric}": value
        for one in reports
        for (role, _, metric), value in ((key.partition("/"), value) for key, value in one["metrics"].items())
    }
    whole = {"task": ALL, "checkpoint": name, "roles": list(roles), "data": told["data"], **about}
    return _Done({**whole, "reports": reports, "left_out": left_out, "metrics": metrics}, found)


def _short_names(names: Sequence[str]) -> list[str]:
    """Names of checkpoints for tables: the run's folder or the file, whole where two would be called alike.

    The same model given again is numbered.
    """
    short = [
        next((part for part in reversed(Path(n).parts) if not part.startswith(("step_", "checkpoints"))), n)
        for n in names
    ]
    told = short if len(set(short)) == len(short) else names
    return [f"{name} ({told[:n].count(name) + 1})" if name in told[:n] else name for n, name in enumerate(told)]


def _roles(checkpoint: Source, which: str | None) -> tuple[str, ...]:
    """The roles asked for; without ``which`` those that are there.

    Raises CheckpointError where both are asked for and one is there.
    """
    if which not in (None, "both"):
        return (which,)
    there = roles_of(checkpoint)
    if which == "both" and len(there) == 1:
        raise CheckpointError(f"{checkpoint} holds the {there[0]} alone: leave out --which both")
    return there


def _load(
    checkpoint: Source, role: str, device: str, precision: str, overrides: Sequence[str], trust_code: bool
) -> ModelEncoder:
    place = pick_device(device)
    config = _config_of_run(checkpoint)
    if precision == "auto" and config is not None:
        own = resolve_precision(config.config.training.precision, place)
        precision = own if has_fast_path(own, place) else precision
    return _in_precision(
        load(checkpoint, role, device=place, overrides=overrides, trust_code=trust_code),
        "fp32" if precision == "auto" else precision,
    )


def _in_precision(encoder: ModelEncoder, precision: str) -> ModelEncoder:
    """The encoder in this precision; ``auto`` leaves it as it is."""
    dtype = encoder.dtype if precision == "auto" else DTYPES[precision]
    return ModelEncoder(encoder.model, encoder.spec, encoder.tokenizer, dtype=dtype)


def _precision_of(encoder: ModelEncoder) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == encoder.dtype), str(encoder.dtype))


def _config_of_run(checkpoint: Source, overrides: Sequence[str] = ()) -> LoadedConfig | None:
    """The config of the run that wrote a checkpoint; None for other models."""
    config = None if checkpoint.run is None else checkpoint.run / "config.yaml"
    return load_config(config, overrides, reading=True) if config is not None and config.is_file() else None


def _evaluator_of_run(checkpoint: Source, task: str, overrides: Sequence[str], trust_code: bool) -> dict[str, Any]:
    """The options of the run's own evaluator of this task, if there is one, and by default what its data set holds out;
    several shards are joined by ``::``.
    """
    config, builds = _config_of_run(checkpoint), _config_of_run(checkpoint, ("evaluators=null", *overrides))
    if config is None or builds is None:
        return {}
    found: Mapping[str, Any] = next(
        (part for part in config.tree["evaluators"].values() if part["type"].rpartition(":")[2] == task), {}
    )
    given = {name: value for name, value in found.items() if value is not None}
    if "data" not in given:
        given["data"] = Builder(builds, trust_code=trust_code).held_out()
    return {n: "::".join(v) if n in ("data", "train_data") and isinstance(v, list) else v for n, v in given.items()}


def _store(
    checkpoint: Source, overrides: Sequence[str], encoder: ModelEncoder, task: str, options: Options
) -> FeatureStore:
    """The folder for what is computed, whose name tells model, task and precision; what others left behind long ago is
    removed.
    """
    about = {
        "version": __version__,
        # the same weights may stand in another model
        "checkpoint": str(Path(checkpoint.name).resolve() if Path(checkpoint.name).exists() else checkpoint),
        "weights": weights_digest(encoder.model),
        "overrides": list(overrides),
        "image": None if encoder.spec.image is None else asdict(encoder.spec.image),
        "precision": _precision_of(encoder),
        "task": task,
        "options": asdict(options),
    }
    store = FeatureStore(cache_root() / "evaluations" / digest(about))
    store.clear_old()
    return store
