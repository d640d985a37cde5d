"""The worked example for authors of augmenters."""

from __future__ import annotations

import sys
from inspect import cleandoc
from types import ModuleType

import pytest

from cosmos_ssl import testing
from cosmos_ssl.api import augmenter


def test_the_example_keeps_to_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, rest = (augmenter.__doc__ or "").partition("in full::\n\n")
    module = ModuleType("example_augmenter")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # what it needs must survive pickling
    exec(cleandoc(rest.partition("\nA config")[0]), module.__dict__)
    testing.check_augmenter(module.MirroredSquare, size=32)
    testing.check_augmenter(module.MirroredSquare, size=16, flip_prob=1.0)
