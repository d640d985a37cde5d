"""For authors of augmenters: the views of a sample, cropped in a worker and finished on the device.

An augmenter in full::

    import torch
    from cosmos_ssl.api import Augmenter, ImageCrops, Pixels, Share, Spec, TowerSpec, ViewSpec
    from torch.nn import functional as F


    class MirroredSquare(Augmenter):
        '''Group ``global``: a random square of the picture, as wide as its shorter side, mirrored by chance.

        ``size``: side of the view, in pixels.
        ``flip_prob``: how likely it is mirrored.
        '''

        modality = "image"

        def __init__(self, spec: Spec, *, size: Pixels = 224, flip_prob: Share = 0.5) -> None:
            self.tower = spec.image or TowerSpec(width=0)
            self.size, self.flip_prob = size, flip_prob

        def offers(self):
            return {"global": ViewSpec(views=1, size=self.size)}

        def crop(self, sample, rng):
            picture = sample.decode()  # uint8 [3, H, W]
            side = min(picture.shape[1:])
            top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[1:])
            square = picture[None, :, top : top + side, left : left + side]
            pixels = F.interpolate(square, (self.size, self.size), mode="bicubic", antialias=True)
            flip = rng.random() < self.flip_prob
            return {"global": ImageCrops(pixels=pixels, params=torch.tensor([[float(flip)]]))}

        def finish(self, group):
            device = group.pixels.device
            mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (self.tower.mean, self.tower.std))
            pixels = (group.pixels / 255 - mean) / std
            flip = group.params[..., None, None].to(device, non_blocking=True) > 0  # [V, B, 1, 1, 1]
            return group.finished(torch.where(flip, pixels.flip(-1), pixels))

A config then says ``augmenters: {image: {type: mirrored_square, size: 96}}``. Options and ``spec``:
``cosmos_ssl.api.part``. Towers, heads and losses ask for the groups of ``offers`` by name; most know ``global`` and
``local``.

When: ``crop`` for one sample at a time, in the loader's workers, on the CPU: it decodes, cuts, resizes, and draws by
the ``rng`` that it is given, which is seeded by run, epoch and place in the epoch, so that no number of workers or
ranks and no restart changes a view. ``set_progress`` tells it the step that the batch is of, so that views may grow
(``ViewSpec(size=None)``) or become harder by it. ``finish`` once a group and step, in the training process, on the
device, on the crops of the whole batch: it changes colours and normalises, and what it is to do by chance was drawn in
``crop`` and comes along in ``params``.

Shapes, with V views of a group, B samples, P parameters and N patches:

- Pictures: ``crop`` gives ``ImageCrops``: ``pixels`` uint8 [V, 3, size, size], ``params`` float32 [V, P] (P may be 0),
  ``masks`` bool [V, N] where they are on offer. ``finish`` gets them as a ``CropGroup``, [V, B, ...], ``pixels`` on the
  device, the rest on the host, and gives an ``ImageGroup`` of floats normalised by the tower's ``mean`` and ``std``.
- Texts: ``crop`` gives V strings, which the tokenizer takes. ``finish`` is not called. Of groups with masks on offer,
  ``mask`` says which of a sample's tokens are hidden, as masked language modelling wants it::

    def offers(self):
        return {"global": ViewSpec(views=1, masks=True)}

    def mask(self, name, tokens, lengths, rng):  # int64 [V, S], [V] -> bool [V, S]; pads are never hidden
        return torch.from_numpy(rng.random(tokens.shape) < 0.15)

What must hold: ``crop`` gives all groups on offer and no others, P and N alike for all samples; it depends on sample,
``rng`` and progress alone, in a pickled copy too, and raises ``BadSample`` for a sample that it cannot use, as
``sample.decode()`` does: another one is taken in its place. ``finish`` draws nothing, leaves its crops as they are, and
makes the same of a view whatever else is in the batch. ``cosmos_ssl.testing.check_augmenter`` tries all this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from cosmos_ssl.api.part import Part, ViewSpec
from cosmos_ssl.api.views import CropGroup, ImageCrops, ImageGroup, Modality, Sample


class Augmenter(Part, ABC):
    """Makes the views of one modality: crops in a worker, photometric work on the device."""

    modality: ClassVar[Modality]

    @abstractmethod
    def offers(self) -> Mapping[str, ViewSpec]:
        """The view groups made, by name (``global``, ``local``, ...); groups without views are left out."""

    @abstractmethod
    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops] | Mapping[str, Sequence[str]]:
        """Worker side: the views of one sample. All randomness comes from ``rng``; raise BadSample to replace it."""

    def mask(self, name: str, tokens: Tensor, lengths: Tensor, rng: np.random.Generator) -> Tensor:
        """Worker side, for texts with masks on offer: which tokens of one sample's group are hidden, bool [V, S].

        ``tokens`` int64 [V, S] are padded, ``lengths`` [V] go up to and with the end of each text; ``rng`` goes on
        where ``crop`` left it.
        """
        raise NotImplementedError(f"{type(self).__name__} offers masks of texts, and draws none: it needs mask()")

    def finish(self, group: CropGroup) -> ImageGroup:
        """Device side, batched: uint8 crops to normalised float views; every image augmenter has its own.

        ``group.finished(pixels)`` makes the result. ``dataclasses.replace(group, pixels=...)`` is taken for it too.
        """
        return group.finished(group.pixels)
