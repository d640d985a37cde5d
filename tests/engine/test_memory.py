"""What a run says where memory is used up, and that it says no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cosmos_ssl.engine.memory import dump_memory, fitting, is_out_of_memory, owners
from cosmos_ssl.engine.optim import Optimizer
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.errors import EXIT_FAILED, TrainingError

GIB = 2**30
ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")


def refuse(*_: Any, **__: Any) -> None:
    raise ON_CUDA


def take_too_much(*_: Any, **__: Any) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def late(function: Callable[..., Any], refuse: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which ``refuse``s from the second call on."""
    calls: list[int] = []

    def call(*given: Any, **options: Any) -> Any:
        calls.append(1)
        return (function if len(calls) == 1 else refuse)(*given, **options)

    return call


@pytest.mark.parametrize(
    ("owner", "place", "refuse", "where", "more"),
    [
        ("Flat", "forward", refuse, "in step 1", "2.00 GiB"),
        ("Flat", "forward", take_too_much, "in step 1", "1152921504606846976 bytes"),
        (Optimizer, "step", refuse, "in step 2", "2.00 GiB"),
        ("Mean", "evaluate", refuse, "in evaluators.mean after step 5", "2.00 GiB"),
        (RunState, "__init__", refuse, "at the start", "2.00 GiB"),
    ],
)
def test_one_message_names_the_owners_and_the_setting(
    tiny: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    place: str,
    refuse: Callable[..., None],
    where: str,
    more: str,
) -> None:
    owner = getattr(tiny, owner) if isinstance(owner, str) else owner
    when = refuse if where[:7] != "in step" else late(getattr(owner, place), refuse)
    monkeypatch.setattr(owner, place, when)
    monkeypatch.setattr(tiny.Flat, "part_source", "another package")  # which is not to blame
    config = tiny.make_config(training={"batch_size": 4})
    with pytest.raises(TrainingError) as caught:
        tiny.make_trainer(tmp_path, config, evaluators={"mean": tiny.Mean()}).train()
    said = str(caught.value)
    assert caught.value.exit_code == EXIT_FAILED and "\n" not in said
    assert said.startswith(f"out of memory on cpu {where} (for {more} more); at most ")
    sizes = {name: float(size) for name, size in re.findall(r"([a-z][a-z ]*) (\d+\.\d\d)(?=[,.])", said.split(": ")[1])}
    known = ["parameters", "gradients", "optimiser state", "teacher"] if "start" not in where else []
    assert sorted(sizes) == sorted(name for name in ("activations and the rest", *known))
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    if "evaluators" in where:
        assert said.endswith("Set evaluators.mean=null, and evaluate the finished run: cosmos-ssl eval")
        assert (tmp_path / "checkpoints" / "step_00000005").exists()
    else:  # a loss of the tiny run moves a buffer, which does not keep it from accumulating
        assert "Set training.micro_batch_size=2 (4 samples of a rank were encoded at once" in said
    assert said in (tmp_path / "log.txt").read_text().replace("\n", " ")


def test_what_cannot_be_accumulated_is_not_told_to(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.Flat, "forward", refuse)
    monkeypatch.setattr(tiny.Match, "calls_heads", True, raising=False)
    with pytest.raises(TrainingError, match=r"\. What takes less: a smaller training.batch_size, more ranks$"):
        tiny.make_trainer(tmp_path).train()


def test_owners_by_hand(tiny: ModuleType) -> None:
    config = tiny.make_config()
    state = RunState(tiny.make_assembly(config), config, torch.device("cpu"))
    weights = 4 * (12 * 6 + 6 + 6 * 6 + 6 + 1)
    assert owners(state) == {
        "parameters": weights + 8,  # the buffer
        "gradients": 0,
        "optimiser state": 0,
        "teacher": weights - 4,  # all but the loss, a parameter and the buffer
    }
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert owners(state)["gradients"] == weights


def test_what_fits_by_hand() -> None:
    assert fitting(64, 41 * GIB, 9 * GIB, 90 * GIB) == int((81 - 9) / 0.5)
    assert fitting(64, 41 * GIB, 9 * GIB, 5 * GIB) == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_signs_of_it(error: BaseException | None, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_a_snapshot_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "memory" / "rank0.pickle"
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("all"))
    assert str(place) in dump_memory(torch.device("cuda"), place) and place.read_text() == "all"
    (tmp_path / "in the way").touch()
    assert not dump_memory(torch.device("cuda"), tmp_path / "in the way" / "rank0.pickle")
    assert not dump_memory(torch.device("cpu"), place)
