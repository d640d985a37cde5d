"""The registry: discovery by metadata, names, loading, options."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl import registry
from cosmos_ssl.errors import PluginError
from cosmos_ssl.registry import Record

Install = Callable[..., Path]

LOSS = """
from typing import Literal
from cosmos_ssl.api import Loss, LossOutput, Need

class Triplet(Loss):
    '''Triplet loss.

    margin: the least difference
        that is wanted.
    ``kind`` (str): which one.
    ``size``, ``note``: things
        of both.

    Text that says with ``head`` what is read. Not
    this. Under ``scale: x`` it is larger.
    '''

    def __init__(self, spec, *, head: str, margin: float = 0.5, kind: Literal["hard", "soft"] = "hard",
                 scale: tuple[float, float] = (0.0, 1.0), size: "int | list[int]" = 3, {extra}) -> None:
        super().__init__()

    def requires(self):
        return [Need(modality="image")]

    def forward(self, ctx):
        return LossOutput(terms={{}})
"""


def loss_source(extra: str = "note: str | None = 'x'") -> str:
    return LOSS.format(extra=extra)


def load_triplet(install: Install, source: str, **more: Any) -> tuple[Record, type[Any]]:
    install(
        "my-losses", "0.3.1", entries={"losses/triplet": "my_losses:Triplet"}, modules={"my_losses": source}, **more
    )
    record = registry.find("losses", "triplet")
    return record, registry.load(record)


def refused(install: Install, source: str, **more: Any) -> str:
    with pytest.raises(PluginError) as caught:
        load_triplet(install, source, **more)
    return str(caught.value)


def added(before: tuple[Record, ...]) -> list[str]:
    """The parts found now and not before (other plugins may be installed where the tests run)."""
    return [str(record) for record in registry.records() if record not in before]


# ---------------------------------------------------------------------------- discovery


def test_own_parts_are_those_of_pyproject() -> None:
    import tomllib

    with (Path(__file__).resolve().parents[2] / "pyproject.toml").open("rb") as file:
        groups = tomllib.load(file)["project"]["entry-points"]
    written = {
        (group.removeprefix("cosmos_ssl."), name, path)
        for group, names in groups.items()
        if group.startswith("cosmos_ssl.")
        for name, path in names.items()
    }
    assert {(r.group, r.name, r.object_path) for r in registry.records() if r.own} == written, "run: pip install -e ."


def test_discovery_is_quick() -> None:
    def seconds() -> float:
        registry.forget()
        start = time.perf_counter()
        registry.records()
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.1


def test_listing_imports_nothing() -> None:
    heavy = "{'torch', 'pydantic', 'cosmos_ssl_plugins'}"
    code = f"import sys; from cosmos_ssl import registry; registry.records(); print({heavy} & {{*sys.modules}})"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )


def test_broken_plugin_is_listed_and_harms_nobody(install: Install) -> None:
    install("my-losses", "0.3.1", entries={"losses/triplet": "no_such_module:X"})
    record = registry.find("losses", "triplet")
    assert record == Record("losses", "triplet", "my-losses", "0.3.1", "no_such_module:X")
    assert registry.load(registry.find("losses", "clip")).__name__ == "Clip"


def test_plugins_can_be_disabled(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("my-losses", entries={"losses/triplet": "my_losses:Triplet"})
    assert any(record.name == "triplet" for record in registry.records())
    monkeypatch.setenv("COSMOS_DISABLE_PLUGINS", "1")
    assert all(record.own for record in registry.records())
    with pytest.raises(PluginError, match="no loss named 'triplet'"):
        registry.find("losses", "triplet")
    monkeypatch.setenv("COSMOS_DISABLE_PLUGINS", "0")
    assert any(record.name == "triplet" for record in registry.records())


def test_unknown_groups_and_second_copies_are_left_out(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = registry.records()
    install("my-losses", "2.0", entries={"losses/triplet": "new:X", "gadgets/thing": "new:Y"})
    older = tmp_path / "older" / "My_Losses-1.0.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: My_Losses\nVersion: 1.0\n")
    (older / "entry_points.txt").write_text("[cosmos_ssl.losses]\ntriplet = old:X\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(older.parent)])
    assert added(before) == ["losses/triplet (my-losses 2.0, new:X)"]


def test_damaged_metadata_harms_nobody(install: Install) -> None:
    before = registry.records()
    site = install("my-losses", "2.0", entries={"losses/triplet": "new:X"})
    for name, metadata, entries in [
        ("nameless", "", "[cosmos_ssl.losses]\na = b:C\n"),
        ("garbled", "Name: garbled\nVersion: 1\n", "[cosmos_ssl.losses]\nno equals sign\n"),
        ("versionless", "Name: versionless\n", "[cosmos_ssl.losses]\nx = b:C\n"),
    ]:
        info = site / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text(entries)
    registry.forget()
    assert added(before) == ["losses/triplet (my-losses 2.0, new:X)", "losses/x (versionless ?, b:C)"]


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("file", ["METADATA", "entry_points.txt"])
def test_metadata_in_no_encoding_harm_nobody(install: Install, file: str) -> None:
    site = install("strange", entries={"losses/strange": "a:T"})
    (bent,) = site.glob(f"strange*/{file}")
    bent.write_bytes(bent.read_bytes() + b"\n[caf\xe9]\n\xff\xfe = x:y\n")
    registry.forget()
    assert "clip" in {record.name for record in registry.records()} and not any(
        r.name == "strange" for r in registry.records()
    )
    registry.load(registry.find("losses", "clip"))


def test_a_bare_name_means_our_own_part(install: Install) -> None:
    install("my-losses", entries={"losses/clip": "my_losses:Clip"})
    assert registry.find("losses", "clip").own
    theirs = registry.find("losses", "my-losses:clip")
    assert theirs.distribution == "my-losses" and registry.spelling(theirs) == "my-losses:clip"
    assert registry.find("losses", "My_Losses:clip") == theirs
    assert registry.find("losses", "cosmos-ssl:clip").own


def test_ambiguous_name(install: Install) -> None:
    install("my-losses", "0.3.1", entries={"losses/triplet": "a:T"})
    install("other-losses", "1.0", entries={"losses/triplet": "b:T"})
    with pytest.raises(PluginError) as caught:
        registry.find("losses", "triplet")
    wanted = (
        "losses/triplet is offered by my-losses 0.3.1 and other-losses 1.0. Write 'my-losses:triplet' or "
        "'other-losses:triplet'."
    )
    assert str(caught.value) == wanted
    assert registry.find("losses", "other-losses:triplet").object_path == "b:T"


def test_unknown_name(install: Install) -> None:
    install("my-losses", "0.3.1", entries={"losses/siglop": "a:T"})
    with pytest.raises(PluginError) as caught:
        registry.find("losses", "cross_modality_distilation")
    first, second = str(caught.value).splitlines()
    assert first == "no loss named 'cross_modality_distilation'. Did you mean 'cross_modality_distillation'?"
    assert second.startswith("Available: c") and ", clip, " in second and "siglop (my-losses 0.3.1)" in second


def test_clone_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmos_ssl.registry.parts.discover", lambda path: ())
    with pytest.raises(PluginError, match=r"not installed, so no parts are registered\. Run: pip install -e \."):
        registry.find("losses", "clip")


# ---------------------------------------------------------------------------- loading


def test_loads_a_part(install: Install) -> None:
    record, cls = load_triplet(install, loss_source(), requires=["cosmos-ssl>=0.1,<1", "torch"])
    assert cls.__name__ == "Triplet" and str(record) == "losses/triplet (my-losses 0.3.1, my_losses:Triplet)"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import einops_that_is_not_there",
            "cannot be imported: ModuleNotFoundError: No module named 'einops_that_is_not_there'",
        ),
        ("raise RuntimeError('first\\nsecond')", "cannot be imported: RuntimeError: first"),
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("class Odd(BaseException): pass\nraise Odd('x')", "cannot be imported: Odd: x"),
        ("", "cannot be imported: AttributeError"),
        ("class Triplet: pass", "is no Loss: expected a subclass of cosmos_ssl.api.Loss, found the class Triplet"),
        ("def Triplet(): pass", "is no Loss: expected a subclass of cosmos_ssl.api.Loss, found a function"),
        ("from cosmos_ssl.api import Head as Triplet", "is no Loss"),
        (
            "from cosmos_ssl.api import Loss\nclass Triplet(Loss): pass",
            "is an incomplete Loss: it does not define forward, requires",
        ),
        (loss_source("type: str = 'x'"), "has an option named 'type', which is reserved"),
        (loss_source("loss_weight: float = 1.0"), "has an option named 'loss_weight', which is reserved"),
        (loss_source("**more: int"), "'more' must be keyword-only"),
        (loss_source("untyped=3"), "the option 'untyped' has no type"),
        (loss_source("odd: 'Nowhere' = 3"), "the type of the option 'odd' cannot be read: NameError"),
        (loss_source().replace("self, spec, *", "self, *"), "the first argument of the constructor must be the spec"),
    ],
)
def test_refuses_what_breaks_the_contract(install: Install, source: str, words: str) -> None:
    message = refused(install, source)
    assert words in message and "\n" not in message
    assert "my_losses:Triplet" in message


def test_reserved_keys_are_those_of_the_group(install: Install) -> None:
    load_triplet(install, loss_source("every_epochs: int = 1, update_when: str = 'x'"))


def test_message_names_group_distribution_version_and_path(install: Install) -> None:
    assert refused(install, "import einops_").startswith(
        "losses/triplet (my-losses 0.3.1, my_losses:Triplet) cannot be imported: "
    )


def test_own_bound_on_us_is_checked_before_the_import(install: Install) -> None:
    message = refused(
        install,
        "raise RuntimeError",
        requires=["torch", "cosmos_ssl >= 99 ; python_version > '3'", "cosmos-ssl<0; extra == 'x'"],
    )
    assert "needs cosmos-ssl >=99, and this is " in message and "my-losses 0.3.1" in message


# ---------------------------------------------------------------------------- options


def test_describes_options(install: Install) -> None:
    _, cls = load_triplet(install, loss_source())
    options = {option.name: option for option in registry.options_of(cls)}
    assert list(options) == ["head", "margin", "kind", "scale", "size", "note"]
    assert options["head"].required and not options["margin"].required and options["margin"].default == 0.5
    assert {name: option.doc for name, option in options.items()} == {
        "head": "Text that says with head what is read.",
        "margin": "the least difference that is wanted.",
        "kind": "which one.",
        "scale": "Under scale: x it is larger.",
        "size": "things of both.",
        "note": "things of both.",
    }
    assert {name: option.type_name for name, option in options.items()} == {
        "head": "str",
        "margin": "float",
        "kind": "Literal['hard', 'soft']",
        "scale": "tuple[float, float]",
        "size": "int | list[int]",
        "note": "str | None",
    }


NESTED = """
from dataclasses import dataclass, field
from pydantic import BaseModel, ConfigDict, Field
from cosmos_ssl.api import Loss

class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: str
    weight: float = Field(1.0, description="Of the step.")

@dataclass(kw_only=True)
class Plan:
    '''``steps``: in their order.'''
    __pydantic_config__ = {"extra": "forbid"}
    steps: list[Step] = field(default_factory=list)

class Planned(Loss):
    def __init__(self, spec, *, plans: dict[str, Plan], last: Step | None = None): super().__init__()
    def requires(self): return []
    def forward(self, ctx): ...
"""


def test_options_made_of_dataclasses_and_models(install: Install) -> None:
    install("my-losses", "0.3.1", entries={"losses/planned": "my_losses:Planned"}, modules={"my_losses": NESTED})
    record = registry.find("losses", "planned")
    cls = registry.load(record)
    inner = [one for option in registry.options_of(cls) for one in registry.nested_options(option)]
    assert [(one.name, one.type_name, one.required, one.doc) for one in inner] == [
        ("plans.NAME.steps", "list[Step]", False, "in their order."),
        ("plans.NAME.steps.N.kind", "str", True, ""),
        ("plans.NAME.steps.N.weight", "float", False, "Of the step."),
        ("last.kind", "str", True, ""),
        ("last.weight", "float", False, "Of the step."),
    ]
    given = {"plans": {"a": {"stepps": []}, "b": {"steps": [{"kind": "x"}, {"kind": "x", "wieght": 2}]}}}
    assert registry.check_options(record, cls, given)[1] == [
        ("plans.a.stepps", "unknown key. Did you mean 'steps'? Accepts: steps"),
        ("plans.b.steps.1.wieght", "unknown key. Did you mean 'weight'? Accepts: kind, weight"),
    ]


def test_converts_options(install: Install) -> None:
    record, cls = load_triplet(install, loss_source())
    given = {"head": "cross", "margin": 1, "scale": [0, 2], "size": [1, 2], "note": None}
    values, faults = registry.check_options(record, cls, given)
    assert not faults
    assert values == {"head": "cross", "margin": 1.0, "scale": (0.0, 2.0), "size": [1, 2], "note": None}
    assert isinstance(values["margin"], float) and isinstance(values["scale"], tuple)


def test_null_stands_for_the_default_where_it_is_no_value(install: Install) -> None:
    record, cls = load_triplet(install, loss_source())
    assert registry.check_options(record, cls, {"head": "x", "margin": None}) == ({"head": "x"}, [])
    assert registry.check_options(record, cls, {"head": None})[1][0][1].startswith(
        "Triplet (my-losses 0.3.1) needs the option 'head' (str)"
    )


@pytest.mark.parametrize(
    ("given", "key", "words"),
    [
        (
            {"margn": 1},
            "margn",
            "unknown option of Triplet (my-losses 0.3.1). Did you mean 'margin'? Accepts: head, margin, kind, ",
        ),
        ({"weight": 1}, "weight", "; and loss_weight"),
        ({"margin": "0.5"}, "margin", "expected a number, got '0.5'"),
        ({"margin": True}, "margin", "expected a number, got true"),
        ({"kind": "medium"}, "kind", "expected 'hard' or 'soft', got 'medium'"),
        ({"scale": [0.5]}, "scale", "expected at least 2 values, got [0.5]"),
        ({"scale": [0, 1, 2]}, "scale", "expected at most 2 items, got [0, 1, 2]"),
        ({"scale": 3}, "scale", "expected a list, got 3"),
        ({"scale": [0.5, "x"]}, "scale.1", "expected a number, got 'x'"),
        ({"size": 1.5}, "size", "expected an integer or a list, got 1.5"),
        ({"size": [1, "x"]}, "size.1", "expected an integer, got 'x'"),
        ({"note": 3}, "note", "expected a string, got 3"),
        ({"margin": math.nan}, "margin", "expected a finite number, got .nan"),
        ({"scale": [0.5, -math.inf]}, "scale.1", "expected a finite number, got -.inf"),
        ({"size": [1, 1 << 63]}, "size.1", "expected a number of at most 64 bits, got 9223372036854775808"),
    ],
)
def test_faults_of_options(install: Install, given: dict[str, Any], key: str, words: str) -> None:
    record, cls = load_triplet(install, loss_source())
    values, faults = registry.check_options(record, cls, {"head": "x", **given})
    found = dict(faults)
    assert key in found and words in found[key], faults
    assert values == {"head": "x"}


def test_all_faults_of_a_part_come_together(install: Install) -> None:
    record, cls = load_triplet(install, loss_source())
    assert [key for key, _ in registry.check_options(record, cls, {"a": 1, "margin": "x"})[1]] == ["a", "margin", ""]


def test_type_that_no_config_can_hold(install: Install) -> None:
    record, cls = load_triplet(install, "import torch\n" + loss_source("dtype: torch.dtype = torch.float32"))
    with pytest.raises(PluginError, match="the option 'dtype' has the type dtype, which no config can hold"):
        registry.check_options(record, cls, {"head": "x", "dtype": "float32"})


def test_types_of_options_may_bound_numbers(install: Install) -> None:
    bounded = "x: Size | None = 3, y: tuple[Share, ...] = (), z: dict[str, Count] = {}"
    source = f"from cosmos_ssl.api import Count, Share, Size\n{loss_source(bounded)}"
    record, cls = load_triplet(install, source)
    types = {option.name: option.type_name for option in registry.options_of(cls)}
    assert (types["x"], types["y"], types["z"]) == ("int | None", "tuple[float, ...]", "dict[str, int]")
    faults = dict(registry.check_options(record, cls, {"head": "x", "x": 1 << 20, "y": [0.5, 2], "z": {"a": 0}})[1])
    assert faults == {
        "x": "expected less than or equal to 65536, got 1048576",
        "y.1": "expected less than or equal to 1, got 2",
        "z.a": "expected greater than or equal to 1, got 0",
    }


def test_spec_may_be_typed_for_checkers_alone(install: Install) -> None:
    source = "from __future__ import annotations\n" + loss_source().replace("self, spec,", "self, spec: NotImported,")
    load_triplet(install, source)
