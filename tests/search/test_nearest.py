"""Exact search against a plain product in double precision: ties, blocks, several queries, both engines."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_ssl.errors import UserError
from cosmos_ssl.search import nearest
from cosmos_ssl.search.nearest import ENGINES, Faiss, Plain, Vectors


def vectors(rows: int, width: int, seed: int) -> Vectors:
    found = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def expected(rows: Vectors, query: Vectors, k: int) -> tuple[Vectors, list[int]]:
    """By the definition: all products in double precision, of equal ones the lower row first."""
    scores = (rows.astype(np.float64) * query.astype(np.float64)).sum(1)
    order = sorted(range(len(rows)), key=lambda row: (-scores[row], row))[:k]
    return scores[order], order


@pytest.mark.parametrize("engine", [Plain, Faiss])
@pytest.mark.parametrize(("block", "k"), [(7, 1), (64, 50), (1000, 200), (4096, 5000)])
def test_is_a_plain_product(
    engine: type[Plain] | type[Faiss], block: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "BLOCK", block)
    monkeypatch.setattr(nearest, "_SPARE", 8)
    monkeypatch.setattr(nearest, "_RANKED", 100)
    rows = vectors(1500, 24, 0)
    rows[700:1100] = rows[3]  # ties across blocks, more than are asked for
    rows[40] = -rows[3]
    queries = np.concatenate([vectors(2, 24, 1), rows[3:4]])
    for asked in (queries, queries[2:]):
        for query, found in zip(asked, engine(rows).top(asked, k), strict=True):
            scores, order = expected(rows, query, k)
            assert found.rows.tolist() == order
            np.testing.assert_array_equal(found.scores, scores)


@pytest.mark.parametrize("engine", [Plain, Faiss])
def test_what_single_precision_cannot_tell_apart(engine: type[Plain] | type[Faiss]) -> None:
    """Rows whose products differ by less than the rounding of a product in single precision come in the right order."""
    rows = np.repeat(vectors(1, 512, 2), 400, 0)
    rows[np.arange(400), np.arange(400)] = np.nextafter(rows[0, :400], np.float32(np.inf))
    query = vectors(1, 512, 3)
    _, order = expected(rows, query[0], 20)
    assert np.argsort(-(rows @ query[0]), kind="stable")[:20].tolist() != order
    assert engine(rows).top(query, 20)[0].rows.tolist() == order


def test_vectors_that_are_not_finite_are_refused() -> None:
    rows = vectors(10, 8, 4)
    rows[5, 3] = np.nan
    for engine in ENGINES.values():
        with pytest.raises(UserError, match="not finite"):
            engine(rows)
