"""Exact search: the rows whose dot products with a query are greatest, by blocked matrix products or by FAISS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.errors import UserError

BLOCK = 1 << 16
"""Rows of a product: its scores stay in the processor's cache."""
_RANKED = 1 << 14  # rows that are ranked at once in double precision: 64 MiB of 512 numbers
_SPARE = 1024  # candidates beyond those asked for, before they are thinned out

Vectors: TypeAlias = NDArray[np.float32]


class Found(NamedTuple):
    """The nearest rows of one query, best first."""

    scores: NDArray[np.float64]
    """[k]"""
    rows: NDArray[np.int64]
    """[k]; of equal scores the lower row comes first."""


class Nearest(Protocol):
    """A way to search."""

    vectors: Vectors

    def top(self, queries: Vectors, k: int) -> list[Found]:
        """Of each query [Q, D] the ``k`` nearest rows, or all where there are fewer."""
        ...


class Plain:
    """Search by matrix products over blocks of rows, without any structure that would have to be built or trusted.

    ``vectors`` are float32 [n, D], in memory or mapped. Scores are those of double precision: products of single
    precision choose the candidates. Such a product of D terms is off by at most e = g |x| |q| with g = D u / (1 - D u)
    and u = 2^-24, in whatever order it is summed (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    Of the k greatest one is therefore never more than 2 e below the k-th greatest product, and all down to there are
    ranked anew. Raises UserError for rows that are not finite.
    """

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self._longest = _longest(vectors)

    def top(self, queries: Vectors, k: int) -> list[Found]:
        """Of each query [Q, D] the ``k`` nearest rows, or all where there are fewer."""
        k = min(k, len(self.vectors))
        margins = [2 * rounding(query, self._longest) for query in queries]
        kept = [_Candidates(k, margin) for margin in margins]
        for start, block in _blocks(self.vectors, BLOCK):
            scores = queries @ block.T if len(queries) > 1 else (block @ queries[0])[None]
            for candidates, row in zip(kept, scores, strict=True):
                candidates.add(row, start)
        return [ranked(self.vectors, q, candidates.rows(), k) for q, candidates in zip(queries, kept, strict=True)]


class Faiss:
    """The same answers by FAISS's flat index, which keeps a copy of the vectors. Raises UserError without FAISS."""

    def __init__(self, vectors: Vectors) -> None:
        try:
            import faiss
        except ImportError as error:
            raise UserError("--engine faiss: FAISS is not installed. Run: pip install 'cosmos-ssl[search]'") from error
        self.vectors = vectors
        self._longest = _longest(vectors)
        self._index: Any = faiss.IndexFlatIP(vectors.shape[1])
        for _, block in _blocks(vectors, BLOCK):
            self._index.add(np.ascontiguousarray(block))

    def top(self, queries: Vectors, k: int) -> list[Found]:
        """Of each query [Q, D] the ``k`` nearest rows, or all where there are fewer."""
        k = min(k, len(self.vectors))
        least = self._index.search(queries, k)[0][:, -1]
        found = []
        for query, score in zip(queries, least, strict=True):
            radius = np.float32(float(score) - 2 * rounding(query, self._longest))
            rows = self._index.range_search(query[None], np.nextafter(radius, np.float32(-np.inf)))[2]
            found.append(ranked(self.vectors, query, np.sort(rows), k))
        return found


ENGINES: dict[str, type[Plain] | type[Faiss]] = {"plain": Plain, "faiss": Faiss}


class _Candidates:
    """Rows of one query that may yet be among its ``k`` nearest."""

    def __init__(self, k: int, margin: float) -> None:
        self._k, self._margin = k, margin
        self._least = -np.inf  # no more than the k-th greatest product so far
        self._scores: list[NDArray[np.float32]] = []
        self._rows: list[NDArray[np.int64]] = []
        self._count = 0

    def add(self, scores: NDArray[np.float32], start: int) -> None:
        """Take the products of a block, which begins at row ``start``."""
        places = np.flatnonzero(scores >= self._least - self._margin)
        self._scores.append(scores[places])
        self._rows.append(places + start)
        self._count += len(places)
        if self._count > self._k + _SPARE:
            self._thin_out()

    def rows(self) -> NDArray[np.int64]:
        """The rows, in order."""
        self._thin_out()
        return self._rows[0]

    def _thin_out(self) -> None:
        scores, rows = np.concatenate(self._scores), np.concatenate(self._rows)
        if len(scores) >= self._k:
            self._least = float(np.partition(scores, -self._k)[-self._k])
        kept = scores >= self._least - self._margin
        self._scores, self._rows, self._count = [scores[kept]], [rows[kept]], int(kept.sum())


def rounding(query: Vectors, longest: float) -> float:
    """The most by which a product in single precision of ``query`` [D] with a row of length ``longest`` is off."""
    terms = len(query) * 2.0**-24
    return terms / (1 - terms) * longest * float(np.linalg.norm(query.astype(np.float64)))


def ranked(vectors: Vectors, query: Vectors, rows: NDArray[np.int64], k: int) -> Found:
    """The best ``k`` of some rows (in order), by products in double precision."""
    exact = query.astype(np.float64)
    parts = (vectors[rows[at : at + _RANKED]].astype(np.float64) * exact for at in range(0, len(rows), _RANKED))
    scores = np.concatenate([part.sum(1) for part in parts]) if len(rows) else np.empty(0)
    order = np.argsort(-scores, kind="stable")[:k]
    return Found(scores[order], rows[order])


def as_vectors(rows: Sequence[Any] | NDArray[Any]) -> Vectors:
    """Rows as float32 [n, D], contiguous."""
    return np.ascontiguousarray(rows, dtype=np.float32)


def _longest(vectors: Vectors) -> float:
    """The length of the longest row. Raises UserError for rows that are not finite."""
    squares = [float(np.einsum("nd,nd->n", block, block).max()) for _, block in _blocks(vectors, BLOCK)]
    if not np.isfinite(squares).all():
        raise UserError("embeddings are not finite numbers. Embed again: cosmos-ssl embed")
    return float(np.sqrt(max(squares, default=0.0))) * 1.001  # itself rounded


def _blocks(vectors: Vectors, size: int) -> Iterator[tuple[int, Vectors]]:
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]
