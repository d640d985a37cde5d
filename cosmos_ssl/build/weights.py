"""Weights of any origin, in our form: one door that finds and verifies them, to load a model from and to start one
from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_ssl.api import Role
from cosmos_ssl.api.callback import KEPT
from cosmos_ssl.config import LoadedConfig
from cosmos_ssl.config.sections import LoraConfig, ModelConfig
from cosmos_ssl.config.source import read_file
from cosmos_ssl.engine.checkpoint import find_fault, is_checkpoint, latest_checkpoint, load_tensors
from cosmos_ssl.engine.layout import roles_in
from cosmos_ssl.errors import CheckpointError, did_you_mean
from cosmos_ssl.files import checkpoint_folders
from cosmos_ssl.interop.attention_heads import assume_heads, other_kinds, told_heads
from cosmos_ssl.interop.files import find_nonfinite
from cosmos_ssl.interop.foreign import foreign_roles, is_foreign, read_foreign
from cosmos_ssl.interop.hub import checkpoint_path
from cosmos_ssl.interop.matching import adapt, compare, load_matched
from cosmos_ssl.interop.official import ROLES
from cosmos_ssl.models.adapters import has_adapters, merged
from cosmos_ssl.models.model import Model


@dataclass(frozen=True, slots=True)
class Source:
    """Weights that were found and, where they are a run's, verified: nothing of them is read before."""

    name: str
    """The file, folder or published name."""
    folder: Path | None = None
    """Of a run: the folder of the checkpoint."""

    @property
    def run(self) -> Path | None:
        """Of a run: its folder."""
        return None if self.folder is None else self.folder.parent.parent

    def __str__(self) -> str:
        return self.name


def find_source(checkpoint: str | Path | Source) -> Source:
    """Find what ``checkpoint`` names: of a run folder its newest sound checkpoint. A released model is fetched.

    Raises CheckpointError for a checkpoint that is damaged, and for anything else.
    """
    if isinstance(checkpoint, Source):
        return checkpoint
    try:
        path = checkpoint_path(checkpoint)
        if is_foreign(path):
            return Source(str(path))
        if is_checkpoint(path):
            if fault := find_fault(path):
                raise CheckpointError(f"{path} is damaged: {fault}")
            return Source(str(path), path)
        if newest := latest_checkpoint(path):
            return Source(str(newest), newest)
        if checkpoint_folders(path):
            raise CheckpointError(f"{path} holds no sound checkpoint: all were passed over")
    except OSError as error:  # a name that no file can have, a folder that may not be looked into
        raise CheckpointError(f"{str(checkpoint)[:100]} cannot be read: {error.strerror}") from error
    raise CheckpointError(
        f"{path} is no run folder with a checkpoint, no checkpoint, no official file and no OpenCLIP model"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The tensors of one role, by our names, and the config of the model that they are of."""

    source: Source
    config: Path | Mapping[str, Any]
    state: Mapping[str, Tensor]
    left_out: Sequence[str] = ()
    """Other names in a file of another program's."""

    def without(self, paths: Iterable[str]) -> Weights:
        """These, but the tensors of the parts under some key paths."""
        left = tuple(f"{path}." for path in paths)
        if not left:
            return self
        return replace(self, state={name: x for name, x in self.state.items() if not name.startswith(left)})

    def check_finite(self, model: Model, names: Iterable[str]) -> None:
        """Raise CheckpointError where one of these tensors holds a NaN, or a parameter among them an infinity."""
        buffers = {name for name, _ in model.named_buffers()}
        if sick := find_nonfinite({name: self.state[name] for name in names}, buffers):
            raise CheckpointError(f"{self.source}: {sick} holds a NaN or an infinity")

    def assumed(self, loaded: LoadedConfig) -> str:
        """Tell people what a config of theirs, with overrides, leaves to assume.

        Raises CheckpointError where that would be a guess.
        """
        return "" if isinstance(self.config, Path) else assume_heads(loaded.tree["model"], self.source)


def read_weights(source: Source, which: str, *, partial: bool = False) -> Weights:
    """The weights of one role. ``partial`` takes another program's also where it has others beside, or lacks some.

    Their values stay in the file until they are used. Raises CheckpointError.
    """
    if source.folder is not None and source.run is not None:
        there = [role for role in roles_in(source.folder) if role != "optimizer"]
        if which not in there:
            hint = did_you_mean(which, there)
            raise CheckpointError(f"{source} holds no {which}.{hint} It holds {', '.join(there)}")
        state = load_tensors(source.folder, which)
        if which == "teacher":  # which has no losses: what an encoder or an export tells of them is the student's
            student = load_tensors(source.folder, "student")
            state = {name: x for name, x in student.items() if name.startswith("losses.")} | state
        config = source.run / "config.yaml"
        return Weights(source=source, config=config, state=_plain(state, config))
    foreign = read_foreign(source.name, which, partial=partial)
    assert foreign is not None, "found before"
    return Weights(source=source, config=foreign.config, state=foreign.state, left_out=foreign.unexpected)


def _plain(state: Mapping[str, Tensor], config: Path) -> Mapping[str, Tensor]:
    """The tensors of a run without what a callback keeps for itself, and with adapters merged.

    Raises CheckpointError where the config beside them does not tell of these.
    """
    state = {name: x for name, x in state.items() if not name.startswith(KEPT)}
    if not has_adapters(state):
        return state
    try:
        lora = LoraConfig.model_validate(read_file(config, []).plain()["model"]["lora"])
        return merged(state, lora.alpha, rslora=lora.rslora)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{config} does not tell of the adapters (model.lora) that the weights hold") from error


def roles_of(source: Source) -> tuple[Role, ...]:
    """The roles that are there. Raises CheckpointError."""
    if source.folder is None:
        return foreign_roles(source.name) or ()
    return tuple(role for role in ROLES if role in roles_in(source.folder))


def start_from(model: Model, config: ModelConfig) -> str:
    """Start a model from the student of ``model.pretrained``; says in a line what was taken over, what not, and why.

    Of the parts asked for every tensor of either side must have its counterpart, unless ``pretrained_partial``, and
    some must in any case; all else starts anew. Raises CheckpointError.
    """
    assert config.pretrained is not None
    checkpoint, partial = config.pretrained.source, config.pretrained_partial
    weights = read_weights(find_source(checkpoint), "student", partial=partial)
    state, adapted = adapt(weights.state, model.state_dict())
    weights = replace(weights, state=state)
    place, parts = f"model.pretrained: {checkpoint}", config.pretrained.parts or list(model.towers)
    what = "the towers" if config.pretrained.parts is None else ", ".join(parts)
    lacking = [part for part in parts if part not in (*model.parts(), "heads", "losses")]
    if lacking:
        hint = did_you_mean(lacking[0], list(model.parts()))
        raise CheckpointError(
            f"model.pretrained.parts: the model has no '{lacking[0]}'.{hint} It has {', '.join(model.parts())}"
        )
    chosen, rest = _split(weights.state, parts)
    report = compare(model, chosen, weights.left_out, _split(model.state_dict(), parts)[0])
    if not partial and (report.missing or report.other_shapes or len(chosen) > len(report.matched)):
        raise CheckpointError(
            f"{place} does not fit {what}: {report}. Take other parts (model.pretrained: {{from: .., parts: [..]}}), "
            "or set model.pretrained_partial=true to take what fits"
        )
    if not report.matched:
        raise CheckpointError(f"{place} has nothing of {what}: {report}")
    others, assumed = _heads(model, weights, set(report.matched))
    if others and not partial:
        raise CheckpointError(
            f"{place} has {others[0]}. Set that, or model.pretrained_partial=true to take the weights all the same"
        )
    weights.check_finite(model, report.matched)
    load_matched(model, weights.state, report)
    names = dict.fromkeys(
        ".".join(name.split(".")[: 2 if name.startswith(("heads.", "losses.")) else 1]) for name in rest
    )
    left = f"not asked for (model.pretrained.parts): {', '.join(names)}" if names else ""
    return "; ".join(filter(None, [f"starting from {weights.source}: {report}", left, *adapted, *others, assumed]))


def _split(state: Mapping[str, Tensor], parts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of these parts, and the others."""
    chosen = {name: x for name, x in state.items() if any(name.startswith(f"{part}.") for part in parts)}
    return chosen, {name: x for name, x in state.items() if name not in chosen}


def _heads(model: Model, weights: Weights, taken: set[str]) -> tuple[list[str], str]:
    """Of the towers whose attention was taken, name those that were trained with other heads than the model's; and what
    is assumed of the others.
    """
    config = weights.config
    ours = isinstance(config, Path)
    if isinstance(config, Path):
        config = read_file(config, []).plain() if config.is_file() else {}
    told = told_heads(config.get("model") or {}, ours=ours)
    towers = [tower for tower in model.towers if f"{tower}.blocks.0.attn.qkv.weight" in taken]
    own: dict[str, Any] = {
        tower: getattr(model.get_submodule(f"{tower}.blocks.0.attn"), "heads", None) for tower in towers
    }
    others = {tower: heads for tower, heads in told.items() if own.get(tower, heads) != heads}
    untold = ", ".join(f"{heads} of the {tower} tower" for tower, heads in own.items() if tower not in told)
    assumed = f"heads, which it does not tell, are taken to be the model's ({untold})" if untold else ""
    kinds = other_kinds(config.get("model") or {}, {tower: model.towers[tower] for tower in towers}, ours=ours)
    return [
        *(f"{heads} heads in its {tower} tower (model.{tower}.heads={heads})" for tower, heads in others.items()),
        *kinds,
    ], assumed
