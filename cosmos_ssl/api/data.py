"""DOC api.data"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_ssl.api.part import Part
from cosmos_ssl.api.views import Sample


class Dataset(Part, ABC):
    """Random access to training samples, laid out in shards (a flat set is one shard)."""

    validation_data: str | None = None
    """Held-out shards, or a folder, that belong to this set, for evaluators that are given none."""

    @abstractmethod
    def prepare(self) -> None:
        """Write or index what is missing; called once, on one process, before any sample is read.

        What takes many minutes calls ``cosmos_ssl.functional.alive()`` now and then: a preparation of which nothing is
        heard for ``training.timeout_minutes`` ends the run.
        """

    def check_exists(self) -> bool:
        """Whether the data are there as far as a glance tells, before ``prepare``; False where that cannot be told, or
        it makes them.

        For a dry run, which indexes nothing. Raises DataError where something is plainly missing.
        """
        return False

    @property
    @abstractmethod
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each shard, int64 [shards]; sample indices run through the shards in order."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Sample ``index``. Raises BadSample for a faulty one, OSError where storage fails."""

    def describe(self, index: int) -> str:
        """Where sample ``index`` lies (the shard's name), for counts and messages."""
        return f"sample {index}"

    def identity(self) -> Mapping[str, Any]:
        """What makes this set this set (names, sizes, counts and contents of shards), for the run's identity; mappings
        may be nested.

        What is not known, at the start of a run or when it goes on, is left out: it is no difference then.
        """
        return {"samples": int(self.shard_sizes.sum())}


class Tokenizer(Part, ABC):
    """Turns strings into token ids."""

    vocab_size: int
    context_length: int
    pad_id: int

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids int64 [n, S], padded, and lengths int64 [n] up to and with the end-of-text token."""

    def lengths(self, ids: Tensor) -> Tensor:
        """Tokens of padded texts [..., S] up to and with the end of each, at least 1: what follows are pads."""
        places = torch.arange(1, ids.shape[-1] + 1, device=ids.device)
        return torch.where(ids != self.pad_id, places, 1).amax(-1)

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The readable piece of text behind each id (for pictures)."""
        return [str(i) for i in ids]
