"""For authors of data sets and tokenizers: samples by number, and texts to token ids.

Both in full::

    import io
    from collections.abc import Sequence

    import numpy as np
    import torch
    from cosmos_ssl.api import Count, Dataset, Sample, Size, Spec, Tokenizer
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor


    class Colours(Dataset):
        '''Pictures of one colour each, with its name.

        ``samples``: how many.
        '''

        NAMES = ("red", "green", "blue", "white")

        def __init__(self, spec: Spec, *, samples: Count = 64) -> None:
            self.samples = samples

        def prepare(self) -> None:
            '''There is nothing to write or to index.'''

        @property
        def shard_sizes(self) -> NDArray[np.int64]:
            return np.array([self.samples], np.int64)

        def read(self, index: int) -> Sample:
            name, file = self.NAMES[index % len(self.NAMES)], io.BytesIO()
            Image.new("RGB", (32, 32), name).save(file, "PNG")
            return Sample(key=f"{index:06d}", image=file.getvalue(), captions={"txt": [f"a {name} square"]})


    class Bytes(Tokenizer):
        '''One token a byte, between a start and an end token.

        ``context_length``: tokens of a padded text.
        '''

        pad_id, vocab_size = 0, 3 + 256

        def __init__(self, spec: Spec, *, context_length: Size = 32) -> None:
            self.context_length = context_length

        def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
            for row, text in zip(ids, texts, strict=True):
                said = [1, *(byte + 3 for byte in text.encode()[: self.context_length - 2]), 2]
                row[: len(said)] = torch.tensor(said)
            return ids, self.lengths(ids)

A config then says ``data: {type: colours}`` and ``tokenizer: {type: bytes}``. Options and ``spec``:
``cosmos_ssl.api.part``; a ``Location`` of a data set is no part of the run, what lies there is told by ``identity``.

When: ``check_exists`` in a dry run, which writes nothing; ``prepare`` once, on one process, before any sample is read;
``shard_sizes`` and ``identity`` at the start; then ``read`` and ``__call__`` in worker processes, which each get a copy
(by pickling or fork) and decode ahead. Samples of a shard are read near one another, shards in another order each
epoch.

Shapes: n texts, S tokens of a padded one. A ``Sample`` holds the encoded picture, sentences by caption field, and
``extras`` (labels) by name.

What must hold: sample ``index`` is the same whenever and wherever it is read. A faulty sample is a BadSample, which is
counted and replaced; where storage fails, OSError, which is retried; DataError where the set cannot be used. Lengths
are 1 at least. A set that needs one look at all that it holds is an ``IndexedDataset``; one that can say of which files
a sample is made, a ``FileBacked``, so that features of it can be kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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
        """Return whether the data are there as far as a glance tells, before ``prepare``; False where that cannot be
        told, or it makes them.

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
        """Return where sample ``index`` lies (the shard's name), for counts and messages."""
        return f"sample {index}"

    def identity(self) -> Mapping[str, Any]:
        """Return what makes this set this set (names, sizes, counts and contents of shards), for the run's identity;
        mappings may be nested.

        What is not known, at the start of a run or when it goes on, is left out: it is no difference then.
        """
        return {"samples": int(self.shard_sizes.sum())}


class IndexedDataset(Dataset):
    """A data set that ``prepare`` looks through once, and that finds what it has seen there the next time."""

    @property
    @abstractmethod
    def is_indexed(self) -> bool:
        """False where no index is of the data as they are now, so that ``prepare`` would look through them."""

    @property
    def index_command(self) -> str | None:
        """The command that makes the index, where a job must not be queued without one, since that takes long."""
        return None


@runtime_checkable
class FileBacked(Protocol):
    """A data set, or what an evaluator reads, that can say of which files a sample is made."""

    def sources(self, index: int) -> Sequence[str]:
        """Paths or URLs of the files that sample ``index`` is read from."""
        ...


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
