"""What ``import cosmos_ssl`` offers, and how it says so."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import cosmos_ssl


@pytest.mark.parametrize("name", sorted(set(cosmos_ssl.__all__) - {"__version__"}))
def test_the_module_shows_what_there_is_with_signatures(name: str) -> None:
    """The docstring's lines are the functions' own signatures, without types, or begin as these do."""
    assert name in dir(cosmos_ssl) and cosmos_ssl.__doc__ is not None
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(getattr(cosmos_ssl, name)).parameters.values()
    ]
    [told] = re.findall(rf"^    {name}(\(.*?\))(?=  |$)", cosmos_ssl.__doc__, re.MULTILINE)
    whole = str(inspect.Signature(plain))
    assert told == whole or whole.startswith(told.removesuffix("...)"))
    assert pydoc.plain(pydoc.render_doc(cosmos_ssl)).count(f"{name}(") >= 2  # there, and of its own


def test_looking_imports_nothing_heavy() -> None:
    code = (
        "import sys, cosmos_ssl; assert 'train' in dir(cosmos_ssl) and cosmos_ssl.__doc__; print('torch' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
