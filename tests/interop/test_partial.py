"""Loading in part: what fits is copied, what does not is told."""

import pytest
import torch
from torch import nn

from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.partial import load_partial


def test_report_and_values():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(4), "c": torch.ones(1)}
    report = load_partial(model, state, "x.pt")
    assert report.matched == ["a.weight"]
    assert report.missing == ["b.weight", "b.bias"]
    assert report.unexpected == ["c"]
    assert report.other_shapes == ["a.bias"]
    assert not report.exact
    assert str(report) == "1 tensors loaded; 2 missing (b.weight, b.bias); 1 unexpected (c); 1 of another shape (a.bias)"
    after = model.state_dict()
    assert (after["a.weight"] == 1).all()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "a.weight")


def test_an_exact_load():
    model = nn.Linear(2, 2)
    assert load_partial(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "x.pt").exact


def test_nothing_in_common_is_an_error():
    with pytest.raises(CheckpointError, match=r"x.pt has nothing in common with the model: .*2 missing"):
        load_partial(nn.Linear(2, 2), {"other": torch.ones(1)}, "x.pt")
