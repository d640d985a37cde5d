"""Image-text retrieval on shards or a folder."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from cosmos_ssl.api import DataError, Encoder, Evaluation, Evaluator, Spec
from cosmos_ssl.evaluation.attention_maps import attention_maps
from cosmos_ssl.evaluation.pictures import Match, draw_attention, draw_matches
from cosmos_ssl.evaluation.retrieval import retrieval_metrics
from cosmos_ssl.evaluation.samples import EvaluationData, check_positive, encode_texts, items_of_all, rows_of_all
from cosmos_ssl.models.encoder import ModelEncoder, resize_crop

SHOWN, SHOWN_ATTENTION, BEST = 8, 4, 3
_log = logging.getLogger("cosmos_ssl.evaluation")


class Retrieval(Evaluator):
    """Finds the texts of each picture among all texts, and the picture of each text among all pictures.

    The score is the dot product of unit features, or the rule of a head that has one (``Head.match``).
    ``data`` are shards, or a folder of pictures with text files beside them (None: the training set's validation data). ``texts`` is
    ``txt``, the text member or file, or a list of the JSON; a picture may have several texts and is found if any of them is. Pictures
    without one are left out. ``max_samples`` takes evenly spread ones; ``workers`` are threads that decode,
    ``batch_size`` pictures are encoded at once.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        data: str | list[str] | None = None,
        texts: str = "txt",
        batch_size: int = 256,
        workers: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        check_positive(batch_size=batch_size)
        self.data = EvaluationData(data, fallback=spec.validation_data, workers=workers, max_samples=max_samples)
        self.texts = texts
        self.batch_size = batch_size

    def prepare(self) -> None:
        """Look for the data. Raises DataError."""
        self.data.check()

    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """``image_to_text_R@1``, ``text_to_image_median_rank``, ...; pictures ``matches`` and ``attention``. Raises DataError."""
        features: list[Tensor] = []
        told: list[tuple[int, list[str]]] = []
        untold: list[tuple[str, list[str]]] = []
        for batch in self.data.batches(encoder, self.batch_size):
            with_texts = [n for n, sample in enumerate(batch.samples) if sample.captions.get(self.texts)]
            untold += [(sample.key, list(sample.captions)) for sample in batch.samples if not sample.captions.get(self.texts)]
            if with_texts:
                features.append(encoder.match_image(batch.pixels[with_texts]))
            told += [(batch.indices[n], list(batch.samples[n].captions[self.texts])) for n in with_texts]
        told, untold = items_of_all(told), items_of_all(untold)
        self._tell_of(untold, len(told))
        places = [place for place, _ in told]
        texts = [text for _, own in told for text in own]
        owners = [number for number, (_, own) in enumerate(told) for _ in own]
        images = rows_of_all(features, encoder.device)
        encoded = encode_texts(encoder, texts, self.batch_size, to_match=True)
        metrics = retrieval_metrics(images, encoded, torch.tensor(owners), score=encoder.match)
        drawn = self._draw(encoder, images, encoded, texts, owners, places) if pictures else {}
        return Evaluation(metrics=metrics, pictures=drawn)

    def _tell_of(self, untold: list[tuple[str, list[str]]], told: int) -> None:
        """Warn of samples, by key and captions, without a text; raise DataError if there are no others."""
        if untold and not told:
            key, captions = untold[0]
            raise DataError(f"texts: samples such as {key} have no texts '{self.texts}'. They have: {', '.join(captions) or 'none'}")
        if untold:
            _log.warning("%d of %d samples have no texts '%s' and are left out", len(untold), len(untold) + told, self.texts)

    def _draw(
        self, encoder: Encoder, images: Tensor, encoded: Tensor, texts: list[str], owners: list[int], places: list[int]
    ) -> dict[str, Tensor]:
        """The best texts of a few pictures; and, where a head of the model can say, where it looks."""
        shown = torch.linspace(0, len(places) - 1, min(SHOWN, len(places))).round().long().tolist()
        samples = [self.data.read(places[n]).decode() for n in shown]
        matches = []
        for picture, n in zip(samples, shown, strict=True):
            scores = encoder.match(images[n : n + 1], encoded)[0].cpu()
            best = scores.topk(min(BEST, len(texts))).indices.tolist()
            own = [i for i, owner in enumerate(owners) if owner == n]
            rank = int((scores > scores[own].max()).sum()) + 1
            found = [(texts[i], float(scores[i]), owners[i] == n) for i in best]
            matches.append(Match(picture=picture, found=found, note=f"own text at rank {rank}: {texts[own[0]]}"))
        drawn = {"matches": draw_matches(matches)}
        if isinstance(encoder, ModelEncoder) and encoder.spec.image is not None:
            few = shown[:: max(1, len(shown) // SHOWN_ATTENTION)][:SHOWN_ATTENTION]
            cut = [resize_crop(samples[shown.index(n)], encoder.spec.image.image_size) for n in few]
            pixels = torch.stack([encoder.preprocess(picture) for picture in cut])
            maps = attention_maps(encoder, pixels, [texts[owners.index(n)] for n in few])
            if maps is not None:
                drawn["attention"] = draw_attention(cut, maps)
        return drawn
