"""Image-text retrieval on shards or a folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_ssl.api import Count, Encoder, Evaluation, Evaluator, Few, Size, Spec
from cosmos_ssl.evaluation.attention_maps import attention_maps
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.pictures import Match, draw_attention, draw_matches
from cosmos_ssl.evaluation.protocols import Retrieved, retrieve
from cosmos_ssl.evaluation.retrieval import best_first
from cosmos_ssl.evaluation.samples import EvaluationData, evenly_spread
from cosmos_ssl.functional import gather_objects
from cosmos_ssl.models.encoder import ModelEncoder, resize_crop

SHOWN, SHOWN_ATTENTION, BEST = 8, 4, 3


class Retrieval(Evaluator):
    """Finds the texts of each picture among all texts, and the picture of each text among all pictures.

    The score is the dot product of unit features, or the rule of a head that has one (``MatchingHead``). ``data`` are
    shards, or a folder of pictures with text files beside them (None: the training set's validation data). ``texts`` is
    ``txt``, the text member or file, or a list of the JSON; a picture may have several texts and is found if any of
    them is. Pictures without one are left out. ``max_samples`` takes evenly spread ones; ``workers`` are threads that
    decode, ``batch_size`` pictures are encoded at once.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        data: str | list[str] | None = None,
        texts: str = "txt",
        batch_size: Size = 256,
        workers: Few | None = None,
        max_samples: Count | None = None,
    ) -> None:
        if not texts:
            raise ValueError("texts: an empty name. Give txt, or a key of the JSON")
        self.data = EvaluationData(data, fallback=spec.validation_data)
        self.job = Job(
            batch_size=batch_size, workers=workers, max_samples=max_samples, allow_missing=True, data=self.data.name
        )
        self.texts = texts

    def prepare(self) -> None:
        """Look for the data and its texts. Raises DataError."""
        self.data.check(texts=self.texts)

    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """``image_to_text_R@1``, ``text_to_image_median_rank``, ...; pictures ``matches`` and ``attention``.

        Raises DataError.
        """
        found = retrieve(encoder, self.data.samples, self.job, texts=self.texts)
        if not any(gather_objects(pictures)):
            return Evaluation(metrics=found.metrics)
        shown = evenly_spread(len(found.places), SHOWN)  # rows of all ranks, whichever of them draws
        few = [found.images.block(n, n + 1) for n in shown]
        blocks = ([encoder.match(image, texts)[0].cpu() for image in few] for _, texts in found.encoded.blocks())
        scores = [torch.cat(parts) for parts in zip(*blocks, strict=True)]
        drawn = self._draw(encoder, found, shown, scores) if pictures else {}
        return Evaluation(metrics=found.metrics, pictures=drawn)

    def _draw(
        self, encoder: Encoder, found: Retrieved, shown: Sequence[int], scores: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The best texts of the pictures ``shown``, of which each scores all texts; and, where a head of the model can
        say, where it looks.
        """
        texts, owners = found.texts, found.owners
        samples = [self.data.picture(found.places[n], encoder.spec.background) for n in shown]
        matches = []
        for picture, n, own in zip(samples, shown, scores, strict=True):
            order = best_first(own)
            rank = next(rank for rank, i in enumerate(order, 1) if owners[i] == n)
            lines = [(texts[i], float(own[i]), owners[i] == n) for i in order[:BEST]]
            note = f"own text at rank {rank}: {texts[order[rank - 1]]}"
            matches.append(Match(picture=picture, found=lines, note=note))
        drawn = {"matches": draw_matches(matches)}
        if isinstance(encoder, ModelEncoder) and encoder.spec.image is not None:
            few = shown[:: max(1, len(shown) // SHOWN_ATTENTION)][:SHOWN_ATTENTION]
            cut = [resize_crop(samples[shown.index(n)], encoder.spec.image.image_size) for n in few]
            pixels = torch.stack([encoder.preprocess(picture) for picture in cut])
            maps = attention_maps(encoder, pixels, [texts[owners.index(n)] for n in few])
            if maps is not None:
                drawn["attention"] = draw_attention(cut, maps)
        return drawn
