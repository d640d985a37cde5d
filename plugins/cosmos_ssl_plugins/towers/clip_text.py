"""The text tower of CLIP and of its relatives: a transformer in which a causal caption costs its own length.

Shape letters: n captions, S context length, T rows of all captions laid end to end, W width, D shared width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import (
    Count,
    Few,
    GroupFeatures,
    GroupPlan,
    Modality,
    Share,
    Size,
    Spec,
    Strength,
    TextGroup,
    Tower,
    TowerSpec,
    ViewSpec,
)
from cosmos_ssl.functional import upload
from cosmos_ssl.models.attention import Ints, put_rows, ranges, take_rows
from cosmos_ssl.models.transformer import Activation, Blocks, Layout, Recomputed, lay_out, layer_of, pick_views, project


class ClipText(Tower):
    """CLIP's text transformer (Radford et al. 2021, section 2.4): pooled is the feature at the end-of-text token.

    Captions are cut after that token, which the causal mask makes exact; only views whose pads are read
    keep them. Where each place sees all others, or the last one is read, captions are whole, with their pads, as in
    OpenCLIP.

    ``width``, ``layers``, ``heads``: size of the transformer; heads are width / 64 unless given.
    ``vocab_size``: rows of the embedding; the tokenizer's unless given.
    ``mlp_ratio``: width inside a block's MLP over the tower's.
    ``layer_scale``: start value of a scale on each branch; None is no scale.
    ``drop_path``: rate of the last block, growing linearly from 0 at the first.
    ``mask_token``: a learned token for hidden words (masked language modelling).
    ``grad_checkpointing``: compute blocks again in the backward pass instead of keeping what they need; ``alternate``:
    every other one, for half of the memory and half of the work.
    ``activation``: of the MLPs: GELU, its quick form (OpenAI's CLIP, DFN), or that by tanh (SigLIP 2).
    ``norm_eps``: what LayerNorms add to the variance.
    ``causal``: each place sees those before it alone.
    ``pooling``: the place that is read: the text's end, the first, or the last of the context, a pad or not.
    ``projection_bias``: the projection adds a bias.

    Raises ValueError for sizes that do not fit.
    """

    modality: ClassVar[Modality] = "text"

    def __init__(
        self,
        spec: Spec,
        *,
        width: Size = 512,
        layers: Few = 12,
        heads: Size | None = None,
        vocab_size: Count | None = None,
        mlp_ratio: Strength = 4.0,
        layer_scale: Strength | None = None,
        drop_path: Share = 0.0,
        mask_token: bool = False,
        grad_checkpointing: Recomputed = False,
        activation: Activation = "gelu",
        norm_eps: Strength = 1e-5,
        causal: bool = True,
        pooling: Literal["end", "first", "last"] = "end",
        projection_bias: bool = False,
    ) -> None:
        super().__init__()
        if causal and pooling == "first":
            raise ValueError("pooling: the first place sees nothing of a text unless causal is false")
        kinds = {"tokens": True, "causal": causal, "masks": mask_token}
        self.capabilities = frozenset(name for name, has in kinds.items() if has)
        self.causal, self.pooling = causal, pooling
        self.kind = {
            "activation": activation,
            "norm_eps": norm_eps,
            "causal": causal,
            "pooling": pooling,
            "projection_bias": projection_bias,
        }
        self.tokenizer_ids = spec.vocab_size
        self.spec = TowerSpec(width=width, vocab_size=vocab_size or spec.vocab_size)
        self.attention = spec.attention
        self.layer_count = layers + 1
        self.token_embedding = nn.Embedding(self.spec.vocab_size, width)
        self.mask_token = nn.Parameter(torch.zeros(width)) if mask_token else None
        self.position_embedding = nn.Parameter(torch.empty(spec.context_length, width))
        self.blocks = Blocks(
            layers,
            width,
            heads,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            drop_path=drop_path,
            grad_checkpointing=grad_checkpointing,
            activation=activation,
            norm_eps=norm_eps,
            kernels=spec.kernels,
        )
        self.norm = nn.LayerNorm(width, norm_eps)
        self.projection = nn.Parameter(torch.empty(width, spec.embed_dim))
        self.projection_bias = nn.Parameter(torch.zeros(spec.embed_dim)) if projection_bias else None
        self._start(width, layers)

    def _start(self, width: int, layers: int) -> None:
        """CLIP's start values."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        nn.init.normal_(self.projection, std=width**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)

    def forward(self, groups: Mapping[str, TextGroup], plan: Mapping[str, GroupPlan]) -> dict[str, GroupFeatures]:
        """Encode the views in ``plan``; token ids int64 [V, B, S] with their lengths [V, B]."""
        if not plan:
            return {}
        captions = _Captions(groups, plan, whole=not self.causal or self.pooling == "last", pooling=self.pooling)
        ids = torch.cat([pick_views(groups[name].tokens, wanted.views).flatten() for name, wanted in plan.items()])
        index, positions = upload(ids.device, captions.index, captions.positions)
        x = self.token_embedding(ids[index])
        if captions.hidden is not None:
            assert self.mask_token is not None
            x = torch.where(upload(x.device, captions.hidden)[0][:, None], self.mask_token, x)
        x = x + F.embedding(positions, self.position_embedding)
        layout = lay_out(captions.lengths, captions.keep, causal=self.causal, device=x.device, backend=self.attention)
        x = self.norm(self.blocks(x, layout))
        return {name: self._features(x, layout, captions, name, wanted) for name, wanted in plan.items()}

    def check_inputs(self, views: Mapping[str, ViewSpec]) -> None:
        """Raise ValueError where the tokenizer has more ids than the embedding rows."""
        if self.spec.vocab_size < self.tokenizer_ids:
            raise ValueError(f"vocab_size: {self.spec.vocab_size} is less than the tokenizer's {self.tokenizer_ids}")

    def unread(self, plan: Mapping[str, GroupPlan]) -> Sequence[str]:
        """The projection and the mask token, where no group reads them."""
        projected = any(wanted.projected for wanted in plan.values())
        hides = self.mask_token is None or any(wanted.hide_masked for wanted in plan.values())
        return (*(() if projected else ("projection*",)), *(() if hides else ("mask_token",)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks alone, in place: what surrounds them plans on the host and is quick."""
        self.blocks.compile(*args, **kwargs)

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: 0 embeddings, 1 .. layers blocks, ``layer_count`` what follows them."""
        return layer_of(name, self.layer_count)

    def _features(
        self, out: Tensor, layout: Layout, captions: _Captions, name: str, wanted: GroupPlan
    ) -> GroupFeatures:
        views, batch, context = captions.shapes[name]
        pooled = take_rows(out, layout.rows(captions.pooled[name])).view(views, batch, -1)
        tokens = None
        if wanted.tokens:
            rows, places = captions.tokens[name]
            total = len(wanted.tokens) * batch * context
            tokens = take_rows(out, layout.rows(rows))
            if len(rows) < total:
                tokens = put_rows(tokens, upload(out.device, places)[0], total)
            tokens = tokens.view(len(wanted.tokens), batch, context, -1)
        return GroupFeatures(
            views=wanted.views,
            pooled=pooled,
            projected=project(pooled, self.projection, self.projection_bias) if wanted.projected else None,
            tokens=tokens,
            token_views=wanted.tokens,
            masked_tokens=take_rows(out, layout.rows(captions.masked[name])) if wanted.masked_tokens else None,
        )


class _Captions:
    """Where the captions of all groups lie in the packed tensor: ordered by length, so that equal lengths are
    neighbours.

    ``index`` [T] are the places of the packed rows in all groups' ids laid end to end, ``positions`` [T] their
    places in their captions, ``keep`` [T] the rows that are read, ``hidden`` [T] those behind the mask token, if any;
    ``pooled``, ``tokens`` and ``masked`` are packed rows by group.
    """

    def __init__(
        self, groups: Mapping[str, TextGroup], plan: Mapping[str, GroupPlan], *, whole: bool, pooling: str
    ) -> None:
        """``whole``: pads are never cut off."""
        self.shapes: dict[str, tuple[int, int, int]] = {}
        ends, lengths, read, bases, places, hidden = [], [], [], [], [], []
        base = 0
        for name, wanted in plan.items():
            views, (batch, context) = len(wanted.views), groups[name].tokens.shape[1:]
            self.shapes[name] = views, batch, context
            end: Ints = pick_views(groups[name].lengths, wanted.views).cpu().numpy()
            asked = np.isin(wanted.views, wanted.tokens)[:, None].repeat(batch, 1) | wanted.masked_tokens
            ends.append(end.ravel())
            read.append(asked.ravel())
            lengths.append(np.where(asked & wanted.pads | whole, context, end).ravel())
            places.append(
                {"end": end.ravel() - 1, "first": 0 * end.ravel(), "last": 0 * end.ravel() + context - 1}[pooling]
            )
            bases.append(base + context * np.arange(views * batch))
            base += views * batch * context
            hides = wanted.hide_masked and groups[name].masks is not None
            hidden.append(_masks(groups[name], wanted).ravel() if hides else np.zeros(views * batch * context, bool))
        end, length, all_read, start, place = (np.concatenate(x) for x in (ends, lengths, read, bases, places))
        order = np.lexsort((all_read, length))
        self.lengths: Ints = length[order]
        packed = np.empty_like(length)
        packed[order] = np.cumsum(self.lengths) - self.lengths
        self.index = ranges(start[order], self.lengths)
        self.positions = ranges(np.zeros_like(self.lengths), self.lengths)
        hides = any(wanted.hide_masked for wanted in plan.values())
        self.hidden = np.concatenate(hidden)[self.index] if hides else None
        self.keep = np.repeat(all_read[order], self.lengths)
        self.keep[packed + place] = True
        self._read(groups, plan, packed, end, packed + place)

    def _read(
        self, groups: Mapping[str, TextGroup], plan: Mapping[str, GroupPlan], packed: Ints, end: Ints, pooled: Ints
    ) -> None:
        self.pooled: dict[str, Ints] = {}
        self.masked: dict[str, Ints] = {}
        self.tokens: dict[str, tuple[Ints, Ints]] = {}
        first = 0
        for name, wanted in plan.items():
            views, batch, context = self.shapes[name]
            here = slice(first, first + views * batch)
            first += views * batch
            self.pooled[name] = pooled[here]
            length = np.full_like(end, context) if wanted.pads else end
            starts, counts = (x[here].reshape(views, batch)[wanted.token_places].ravel() for x in (packed, length))
            self.tokens[name] = ranges(starts, counts), ranges(context * np.arange(len(starts)), counts)
            if wanted.masked_tokens:
                text, place = np.nonzero(_masks(groups[name], wanted).reshape(-1, context))
                self.masked[name] = packed[here][text] + place


def _masks(group: TextGroup, wanted: GroupPlan) -> NDArray[np.bool_]:
    """The masks of the views that are encoded, bool [V, B, S]."""
    assert group.masks is not None
    return cast(NDArray[np.bool_], pick_views(group.masks, wanted.views).cpu().numpy())
