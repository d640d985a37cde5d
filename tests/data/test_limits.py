"""The machine's limits, looked at before workers start."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cosmos_ssl.data import Loader, Order, Shards
from cosmos_ssl.data.limits import check_open_files, check_shared_memory
from cosmos_ssl.errors import UserError


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_shared_memory(free // 2, tmp_path)
    check_shared_memory(2 * free, tmp_path / "absent")
    with pytest.raises(
        UserError, match=r"take up to [\d,.]+ GiB of .*, which has [\d,.]+ GiB free\. Enlarge it .*loader\.workers"
    ):
        check_shared_memory(2 * free, tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError):
        check_shared_memory(free // 2, tmp_path)


def test_open_files_are_lifted_to_the_hard_limit_and_no_further() -> None:
    code = """
import resource
from cosmos_ssl.data.limits import check_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
check_open_files(300)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
check_open_files(400)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "(512, 512)\n"
    assert (
        "UserError: loader: batches under way" in done.stderr
        and "and the limit is 512. Raise it (ulimit -n)" in done.stderr
    )


def test_what_a_loader_asks_for(shards: Any, views: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    dataset = Shards(shards(40), caption_schema="dreamlip")

    def start(workers: int, free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free))
        order = Order(dataset.shard_sizes, 8, lanes=8, seed=5)
        batches = Loader(dataset, order, **views, workers=workers, prefetch=3).batches(0, 2)
        assert next(batches).step == 0
        batches.close()

    offers = views["image"].offers().values()
    batch = 8 * sum(3 * spec.views * spec.size**2 for spec in offers)
    start(2, 7 * batch)
    with pytest.raises(UserError, match=r"loader\.prefetch"):
        start(2, 7 * batch - 1)
    start(0, 0)
    check_open_files(0)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
