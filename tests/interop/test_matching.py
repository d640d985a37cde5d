"""Loading in part: what fits is copied, what does not is told."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from cosmos_ssl.interop.matching import adapt, compare, load_matched


def test_report_and_values():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 2), "d": nn.Linear(1, 1, bias=False)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {
        "a.weight": torch.ones(3, 2),
        "a.bias": torch.ones(4),
        "c": torch.ones(1),
        "d.weight": torch.ones(1, 1, dtype=torch.int64),
    }
    report = compare(model, state, ["attn_mask"])
    assert report.matched == ["a.weight"]
    assert report.missing == ["b.weight", "b.bias"]
    assert report.unexpected == ["c", "attn_mask"]
    assert report.other_shapes == ["a.bias", "d.weight"]
    told = "1 of 5 tensors; left out: 2 of another shape (a.bias, d.weight), 2 not in the model (c, attn_mask)"
    assert str(report) == f"{told}; 2 of the model (b.weight, b.bias) as they were"
    load_matched(model, state, report)
    after = model.state_dict()
    assert (after["a.weight"] == 1).all()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "a.weight")


def test_an_exact_load():
    model = nn.Linear(2, 2)
    assert (
        str(compare(model, {"weight": torch.ones(2, 2, dtype=torch.float16), "bias": torch.ones(2)}))
        == "2 of 2 tensors"
    )


@pytest.mark.parametrize(
    ("name", "shape", "prefix"), [("position_embedding", (17, 8), 1), ("model.pos_embed", (1, 21, 8), 5)]
)
def test_positions_of_another_grid(name, shape, prefix):
    """As timm resamples them; those of another width, and a mask token that is there, stay."""
    table = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    own = {f"image.{name}": torch.empty(*shape[:-2], prefix + 36, 8), "image.mask_token": torch.ones(8)}
    found, notes = adapt({f"image.{name}": table}, own)
    expected = resample_abs_pos_embed(table.view(1, *shape[-2:]), [6, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(found[f"image.{name}"], expected.view(*shape[:-2], -1, 8))
    assert found["image.mask_token"] is own["image.mask_token"]
    assert notes == [
        f"image positions resampled from {shape[-2]} to {prefix + 36} tokens",
        "image.mask_token starts anew",
    ]
    for other in (torch.empty(*shape[:-2], prefix + 36, 9), torch.empty(*shape[:-2], prefix + 37, 8)):
        state = {f"image.{name}": table, "image.mask_token": torch.zeros(8)}
        assert adapt(state, {**own, f"image.{name}": other}) == (state, [])
