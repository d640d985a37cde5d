"""Files written whole: what stood there stands until the new one is on the disk; what failed has one exit code
everywhere.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cosmos_ssl.data.storage import BlockCache
from cosmos_ssl.errors import EXIT_LOST, EXIT_USER
from cosmos_ssl.files import storage_error, written_whole


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), written_whole(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "x").symlink_to(tmp_path / "theirs")
    with written_whole(tmp_path / "x") as file:
        file.write(b"mine")
    assert (tmp_path / "theirs").read_bytes() == b"theirs" and (tmp_path / "x").read_bytes() == b"mine"
    assert not (tmp_path / "x").is_symlink()


def test_no_device_or_pipe_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match="is no regular file"), written_whole(path):
            pass
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_for_whom_the_umask_says(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        with written_whole(tmp_path / "a") as file:
            file.write(b"whole")
        BlockCache(tmp_path, 1 << 20)._store("b", b"block")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("a", "b.block"), 0o666 & ~mask)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, EXIT_USER),
        (errno.EROFS, EXIT_USER),
        (errno.ENOTDIR, EXIT_USER),
        (errno.ENOSPC, EXIT_LOST),
        (errno.EIO, EXIT_LOST),
    ],
)
def test_what_failed_says_who_can_mend_it(number: int, code: int) -> None:
    error = storage_error(OSError(number, os.strerror(number), "/a/b"), "--output /a cannot be written")
    assert error.exit_code == code and str(error) == f"--output /a cannot be written: {os.strerror(number)} (/a/b)"
