"""MoCo's losses: a query of the student finds its key of the teacher among those of the batch and of a queue.

Shape letters: V query views, U key views, B samples of this rank, N of all ranks, D width of a key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cosmos_ssl.api import ALL, Loss, LossOutput, Modality, Need, Spec, StepContext, Temperature, Whole, normalise
from cosmos_ssl.functional import info_nce

MAX_LOG_SCALE = math.log(100)


class Queue(nn.Module):
    """The newest keys, the same on all ranks (MoCo, arXiv 1911.05722, section 3.1); random ones in places that none has
    taken yet.
    """

    keys: Tensor
    place: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", normalise(torch.randn(size, width)))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def take(self) -> Tensor | None:
        """Unit vectors [size, D], a copy: the queue moves on before the gradient is asked for. None of an empty one."""
        return self.keys.clone() if len(self.keys) else None

    @torch.no_grad()
    def put(self, keys: Tensor) -> None:
        """Put [U, N, D], gathered, into the places of the oldest; of more than there are places the last ones."""
        size = len(self.keys)
        if size:
            newest = keys.flatten(0, 1)[-size:]
            places = (self.place + torch.arange(len(newest), device=keys.device)) % size
            self.keys.index_copy_(0, places, newest.to(self.keys.dtype))
            self.place.add_(len(newest)).remainder_(size)


class MocoText(Loss):
    """A picture of the student finds the teacher's text of it among the texts of the global batch and of a queue, and a
    text the teacher's picture: the mean of both cross-entropies (ALBEF, arXiv 2107.07651, section 3.2).

    Queries are global pictures and all texts, keys the teacher's global ones; view pairs are averaged.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        text_queue: Whole = 65536,
        image_queue: Whole = 65536,
        init_logit_scale: float = 1 / 0.07,
    ) -> None:
        """Raises ValueError for a scale out of range.

        text_queue: past texts that a picture is told apart from, beside those of the batch; 0 keeps none.
        image_queue: past pictures that a text is told apart from; 0 keeps none.
        init_logit_scale: inverse temperature at the start; it is learned, and kept within 1..100.
        """
        super().__init__()
        if not 1 <= init_logit_scale <= 100:
            raise ValueError(f"init_logit_scale: {init_logit_scale:g} is outside 1..100")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.texts, self.images = Queue(text_queue, spec.embed_dim), Queue(image_queue, spec.embed_dim)

    def requires(self) -> list[Need]:
        """Own queries, and keys of all ranks."""
        return [
            Need(modality="image", group="global", hidden=False),
            Need(modality="text", group=ALL, hidden=False),
            Need(role="teacher", modality="image", group="global", gathered=True),
            Need(role="teacher", modality="text", group="global", gathered=True),
        ]

    def forward(self, ctx: StepContext) -> LossOutput:
        """A term for each direction, and the scale; the keys of this step join the queues."""
        scale = self.logit_scale.exp()
        images, texts = ctx.student.stack("image", group="global"), ctx.student.stack("text")

        def find(queries: Tensor, modality: Modality, queue: Queue) -> Tensor:
            keys = normalise(ctx.gathered["teacher"].stack(modality, group="global"))  # [U, N, D]
            loss = info_nce(normalise(queries), keys, scale, negatives=queue.take(), symmetric=False)
            queue.put(keys)
            return loss / 2

        terms = {
            "image_to_text": find(images, "text", self.texts),
            "text_to_image": find(texts, "image", self.images),
        }
        return LossOutput(terms=terms, metrics={"logit_scale": scale})

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the log-scale within 0..ln 100."""
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)


class MocoV3(Loss):
    """A view of the student finds the teacher's other views of its picture: 2 t CE(q k / t), summed over the views of
    the student and averaged over the other ones of each (MoCo v3, arXiv 2104.02057, algorithm 1).

    A queue makes it MoCo's, with both views as queries.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        head: str,
        target_head: str,
        group: str = "global",
        temperature: Temperature = 0.2,
        queue_size: Whole = 0,
    ) -> None:
        """Raises ValueError for heads that are not there, and for a group of a single view.

        head: the head whose output named as the group is the student's query: predictions.
        target_head: the teacher's, whose output is the key: projections.
        group: the view group, of at least two views.
        temperature: what similarities are divided by.
        queue_size: past keys that a query is told apart from, beside those of the batch.
        """
        super().__init__()
        for option, name in (("head", head), ("target_head", target_head)):
            if group not in spec.heads.get(name, {}):
                able = ", ".join(n for n, outputs in spec.heads.items() if group in outputs) or "none"
                raise ValueError(f"{option}: no head '{name}' with an output '{group}'. Heads that have it: {able}")
        width, other = (spec.heads[name][group] for name in (target_head, head))
        if width != other:
            raise ValueError(f"head: '{head}' gives {other} numbers, and '{target_head}' {width}. Make them alike")
        if group in spec.image_views and spec.image_views[group].views < 2:
            raise ValueError(f"group: '{group}' has a single view, and pairs need two")
        self.head, self.target_head, self.group, self.temperature = head, target_head, group, temperature
        self.queue = Queue(queue_size, width)

    def requires(self) -> list[Need]:
        """Own queries, and keys of all ranks."""
        return [
            Need(head=self.head, outputs=(self.group,)),
            Need(role="teacher", head=self.target_head, outputs=(self.group,), gathered=True),
        ]

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term; the keys of this step join the queue."""
        queries = normalise(ctx.student.heads[self.head][self.group])  # [V, B, D]
        keys = normalise(ctx.gathered["teacher"].heads[self.target_head][self.group])  # [V, N, D]
        scale, past = queries.new_full((), 1 / self.temperature), self.queue.take()
        found = [
            info_nce(queries[v, None], torch.cat([keys[:v], keys[v + 1 :]]), scale, negatives=past, symmetric=False)
            for v in range(len(queries))
        ]
        self.queue.put(keys)
        return LossOutput(terms={"pairs": 2 * self.temperature * torch.stack(found).sum()})
