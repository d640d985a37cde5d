"""Files that are there whole or not at all, for whom the umask says."""

import os

import pytest

from cosmos_ssl.data.storage import BlockCache
from cosmos_ssl.files import written_whole


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_for_whom_the_umask_says(tmp_path, mask):
    old = os.umask(mask)
    try:
        with written_whole(tmp_path / "a") as file:
            file.write(b"whole")
        BlockCache(tmp_path, 1 << 20)._store("b", b"block")
    finally:
        os.umask(old)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("a", "b.block"), 0o666 & ~mask
    )


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="full"), written_whole(tmp_path / "a") as file:
        file.write(b"new")
        raise OSError("full")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}
