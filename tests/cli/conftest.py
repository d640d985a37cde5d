"""A command run in this process, as a user would run it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from cosmos_ssl.cli import main

LOADED = re.compile(r"^the (student|teacher) of .+: [\d,]+ of [\d,]+ tensors.*\n", re.MULTILINE)

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``command("plugins", "list")`` returns exit code, standard output, and standard error without the line of each
    load.
    """

    def command(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as left:  # argparse's way
            code = left.code if isinstance(left.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, LOADED.sub("", err)

    return command
