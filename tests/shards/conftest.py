"""Fixtures of all tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _apart(own_cache: None) -> None:
    """Indexes and downloads of one test are no other's."""
