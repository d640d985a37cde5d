"""Profiles: where a run takes place. A YAML file, checked, with values of the command line over it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from cosmos_ssl.config.source import COMMAND_LINE, Node, fault, merge, parse_overrides, read_file
from cosmos_ssl.errors import ConfigError, UserError, did_you_mean
from cosmos_ssl.registry import describe_errors

Positive = Annotated[int, Field(gt=0)]


def _one_line(text: str) -> str:
    """Refuse what would write more lines into a batch script than one."""
    if any(unicodedata.category(letter) == "Cc" and letter != "\t" for letter in text):
        raise PydanticCustomError("wanted", "{wanted}", {"wanted": "one line without control characters"})
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


def minutes(value: object) -> object:
    """Minutes of SLURM's ways to write a time: a number of minutes, ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM``,
    ``D-HH:MM:SS``.
    """
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value  # an int, or what the model refuses
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    if match["days"]:
        hours, minute, seconds = 24 * int(match["days"]) + first, second, third
    elif match["third"]:
        hours, minute, seconds = first, second, third
    else:
        hours, minute, seconds = 0, first, second
    return 60 * hours + minute + (seconds > 0)


class _Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LocalProfile(_Profile):
    """This machine: ``nproc`` is the number of processes."""

    kind: Literal["local"]
    nproc: Positive = 1

    @property
    def ranks(self) -> int:
        """The number of processes that train."""
        return self.nproc


class SlurmProfile(_Profile):
    """A SLURM cluster.

    Keys without a comment are sbatch's options of that name; what is None is left to the cluster.
    """

    kind: Literal["slurm"]
    nodes: Positive = 1
    tasks_per_node: Positive = 1
    """Ranks of each node: one a GPU."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_task: Positive | None = None
    mem: Line | int | None = None
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    time: Annotated[Positive, BeforeValidator(minutes, json_schema_input_type=str | int)] = 720
    """Minutes, or any of SLURM's forms."""
    signal_delay_s: Positive = 120
    """Seconds before the end of ``time`` at which SIGUSR2 comes: a step and a save must fit."""
    setup: list[Line] = []
    """Lines of the batch script before srun."""
    srun_args: list[Line] = []
    python: Line | None = None
    """What starts Python within srun; by default the Python that submits."""
    environment: dict[Name, Line | int | float] = {}
    slurm: dict[Annotated[str, Field(pattern=r"^[a-z][a-z_-]*$")], Line | int | bool] = {}
    """Further options of sbatch, by name."""
    restarts_without_progress: Annotated[int, Field(ge=0)] = 3
    """So many restarts in a row without a new checkpoint end a job."""
    chain: Annotated[int, Field(gt=0, le=1000)] | None = None
    """So many jobs of the run, one after the other, in the place of requeueing."""

    @model_validator(mode="after")
    def _not_both(self) -> SlurmProfile:
        """Raise an error where jobs of a chain would be requeued too."""
        if self.chain is not None and self.slurm.get("requeue", False) is not False:
            wanted = "no slurm.requeue beside it: the jobs of a chain follow one another and are not requeued"
            raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
        return self

    @property
    def ranks(self) -> int:
        """The number of processes that train."""
        return self.nodes * self.tasks_per_node

    @property
    def gpus(self) -> bool:
        """Whether the job is given GPUs."""
        others = [f"{name}={value}" for name, value in self.slurm.items() if name.startswith(("gpus", "gres"))]
        return bool(self.gpus_per_node) or any("gpu" in text for text in others)


Profile = LocalProfile | SlurmProfile

_KINDS: dict[str, type[LocalProfile] | type[SlurmProfile]] = {"local": LocalProfile, "slurm": SlurmProfile}
_FOLDER = Path(__file__).parent / "profiles"


def packaged_profiles() -> dict[str, Path]:
    """The profiles that come with cosmos-ssl, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_profile(name: str) -> Path:
    """The file that ``name`` means: as given, else packaged. Raises UserError where there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = packaged_profiles()
    if name.removesuffix(".yaml") in packaged:
        return packaged[name.removesuffix(".yaml")]
    hint = did_you_mean(name, list(packaged))
    raise UserError(
        f"no profile '{name}': there is no such file.{hint} Those that come with cosmos-ssl: {', '.join(packaged)}"
    )


def read_profile(name: str, values: Sequence[str] = ()) -> Profile:
    """The profile that ``name`` means, with ``KEY=value`` over it.

    Raises UserError for the name, ConfigError with all faults.
    """
    faults: list[str] = []
    root = merge(read_file(find_profile(name), faults), parse_overrides(values, faults))
    kind = root.at(["kind"])
    model = _KINDS.get(str(kind.value)) if kind is not None else None
    if model is None:
        origin = root.origin if kind is None else kind.origin
        raise ConfigError(
            [
                *faults,
                _fault(origin, "kind", f"expected local or slurm{'' if kind is None else f', got {kind.value!r}'}"),
            ]
        )
    try:
        profile = model.model_validate(root.plain())
    except ValidationError as error:
        found = error.errors(include_url=False)
        if whole := [one for one in found if not one["loc"]]:  # what two keys make together
            origin = (root.at(["chain"]) or root).origin
            faults.append(_fault(origin, "chain", f"expected {whole[0]['msg']}"))
            found = []
        for key in dict.fromkeys(str(one["loc"][0]) for one in found):
            faults += _of_key(
                root, model, key, [{**one, "loc": one["loc"][1:]} for one in found if one["loc"][0] == key]
            )
    if faults:
        raise ConfigError(faults)
    return profile


def _of_key(root: Node, model: type[BaseModel], key: str, errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pydantic's errors under one key, located."""
    node = root.at([key]) or root
    if errors[0]["type"] == "extra_forbidden":
        known = list(model.model_fields)
        if model is LocalProfile and key in SlurmProfile.model_fields:
            told = f"unknown key. Accepts: {', '.join(known)}; {key} is of profiles of kind slurm"
            return [_fault(node.origin, key, told)]
        return [_fault(node.origin, key, f"unknown key.{did_you_mean(key, known)} Accepts: {', '.join(known)}")]
    if key == "time":
        return [
            _fault(node.origin, key, f"expected minutes or a time such as 12:00:00 or 2-00:00:00, got {node.plain()!r}")
        ]
    bad_names = [str(one["loc"][0]) for one in errors if one["loc"][-1:] == ("[key]",)]
    found: list[tuple[tuple[str, ...], str]] = [
        ((name,), f"no name for {'a variable' if key == 'environment' else 'an option'}") for name in bad_names
    ]
    found += describe_errors([one for one in errors if one["loc"][-1:] != ("[key]",)], node.plain())
    return [_fault((root.at([key, *path]) or node).origin, ".".join([key, *path]), message) for path, message in found]


def _fault(origin: str, key: str, message: str) -> str:
    return fault(origin, f"profile.{key}" if origin == COMMAND_LINE else key, message)
