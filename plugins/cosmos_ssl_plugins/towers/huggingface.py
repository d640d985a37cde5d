"""BERT- and RoBERTa-like text encoders of Hugging Face as text towers, run as they are: one pass for each view
group.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import (
    GroupFeatures,
    GroupPlan,
    Location,
    Modality,
    Size,
    Spec,
    TextGroup,
    Tower,
    TowerSpec,
    UserError,
)
from cosmos_ssl.models.transformer import pick_views


class HuggingFaceText(Tower):
    """A bidirectional text encoder of the transformers library, with a projection behind it.

    Either ``model`` or ``architecture``. Code from the hub is never run.

    ``model``: a folder, or a name on the hub.
    ``pretrained``: start from the model's weights.
    ``architecture``: the kind of a model that needs no hub, such as ``bert``.
    ``config``: values of its configuration, such as ``{hidden_size: 256}``; of a ``model``, those to change.
    ``pooling``: the first token's feature (``cls``) or the mean over the text.
    ``projection_hidden``: width of a layer with GELU, without bias, before the projection; None is no such layer.
    ``mask_token``: a learned token for hidden words (masked language modelling).
    ``grad_checkpointing``: compute blocks again in the backward pass instead of keeping what they need.

    Raises UserError where the hub cannot be reached, ValueError for options that do not fit.
    """

    modality: ClassVar[Modality] = "text"
    capabilities = frozenset({"tokens"})

    def __init__(
        self,
        spec: Spec,
        *,
        model: Location | None = None,
        pretrained: bool = False,
        architecture: str | None = None,
        config: dict[str, Any] | None = None,
        pooling: Literal["cls", "mean"] = "cls",
        projection_hidden: Size | None = None,
        mask_token: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (model is None) == (architecture is None):
            raise ValueError("give either model (a folder or a name on the hub) or architecture (such as bert)")
        if pretrained and model is None:
            raise ValueError("pretrained: needs a model, not an architecture")
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling: '{pooling}' is neither cls nor mean")
        self.pooling = pooling
        self.capabilities = frozenset({"tokens"} | ({"masks"} if mask_token else set()))
        known = (
            _named_config(model, config or {})
            if model is not None
            else _own_config(str(architecture), config or {}, spec.vocab_size)
        )
        _check_sizes(known, spec)
        self.pad_id = int(known.pad_token_id or 0)
        # a plan built on the meta device only asks for shapes
        self.model = _create(model if pretrained and torch.get_default_device().type != "meta" else None, known)
        self.model.pooler = None  # nobody reads it, and it would stay without gradient
        if grad_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", None)  # its name since transformers 5
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        width = int(known.hidden_size)
        self.spec = TowerSpec(width=width)
        self.layer_count = int(known.num_hidden_layers) + 1
        self.mask_token = nn.Parameter(torch.zeros(width)) if mask_token else None
        hidden = None if projection_hidden is None else nn.Linear(width, projection_hidden, bias=False)
        self.projection_hidden = hidden
        inner = projection_hidden or width
        self.projection = nn.Parameter(nn.init.normal_(torch.empty(inner, spec.embed_dim), std=inner**-0.5))

    def forward(self, groups: Mapping[str, TextGroup], plan: Mapping[str, GroupPlan]) -> dict[str, GroupFeatures]:
        """Encode the views in ``plan``; token ids int64 [V, B, S] with their lengths [V, B].

        Pads are never attended to.
        """
        return {name: self._encode(groups[name], wanted) for name, wanted in plan.items()}

    def _encode(self, group: TextGroup, wanted: GroupPlan) -> GroupFeatures:
        ids, lengths = pick_views(group.tokens, wanted.views), pick_views(group.lengths, wanted.views)
        longest, lengths = int(lengths.max()), lengths.to(ids.device, non_blocking=True)
        views, batch, context = ids.shape
        used = context if wanted.tokens and wanted.pads else longest
        real = torch.arange(used, device=ids.device) < lengths.flatten()[:, None]  # [V B, S]
        ids = ids.flatten(0, 1)[:, :used].where(real, self.pad_id)
        given: dict[str, Tensor] = {"input_ids": ids}
        masks = None if group.masks is None else pick_views(group.masks, wanted.views).flatten(0, 1)[:, :used]
        if wanted.hide_masked and masks is not None:
            assert self.mask_token is not None
            words: Tensor = self.model.get_input_embeddings()(ids)
            given = {
                "inputs_embeds": torch.where(masks.to(ids.device)[..., None], self.mask_token.to(words.dtype), words)
            }
        out: Tensor = self.model(**given, attention_mask=real.long()).last_hidden_state
        pooled = out[:, 0] if self.pooling == "cls" else (out * real[..., None]).sum(1) / lengths.flatten()[:, None]
        pooled = pooled.view(views, batch, -1)
        tokens = None
        if wanted.tokens:
            kept = out if wanted.pads else F.pad(out * real[..., None], (0, 0, 0, context - used))
            tokens = kept.view(views, batch, context, -1)[wanted.token_places]
        return GroupFeatures(
            views=wanted.views,
            pooled=pooled,
            projected=self._project(pooled) if wanted.projected else None,
            tokens=tokens,
            token_views=wanted.tokens,
            masked_tokens=out[masks.to(ids.device)] if wanted.masked_tokens and masks is not None else None,
        )

    def _project(self, pooled: Tensor) -> Tensor:
        inner = pooled if self.projection_hidden is None else F.gelu(self.projection_hidden(pooled))
        return inner @ self.projection

    def unread(self, plan: Mapping[str, GroupPlan]) -> Sequence[str]:
        """The projection and the mask token, where no group reads them."""
        projected = any(wanted.projected for wanted in plan.values())
        hides = self.mask_token is None or any(wanted.hide_masked for wanted in plan.values())
        return (*(() if projected else ("projection*",)), *(() if hides else ("mask_token",)))

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: 0 embeddings, 1 .. layers, ``layer_count`` what follows them."""
        layer = re.search(r"\.layers?\.(\d+)\.", name)
        if layer:
            return int(layer[1]) + 1
        return 0 if "embeddings" in name else self.layer_count


def _own_config(architecture: str, config: dict[str, Any], vocab_size: int) -> Any:
    """The library's configuration of an architecture, sizes from ``config``."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if architecture not in CONFIG_MAPPING_NAMES:
        close = difflib.get_close_matches(architecture, list(CONFIG_MAPPING_NAMES), n=1)
        raise ValueError(
            f"architecture: transformers has no '{architecture}'." + (f" Did you mean '{close[0]}'?" if close else "")
        )
    _check_keys(AutoConfig.for_model(architecture), config)
    return AutoConfig.for_model(architecture, **{"vocab_size": vocab_size} | config)


def _named_config(model: str, config: dict[str, Any]) -> Any:
    """The configuration of a folder or of a name on the hub, with changes."""
    from transformers import AutoConfig

    try:
        known = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise _unreachable(model, "configuration", error) from error
    _check_keys(known, config)
    known.update(config)
    return known


def _check_keys(known: Any, config: dict[str, Any]) -> None:
    """transformers would take any key and ignore it."""
    for key in config:
        if not hasattr(known, key):
            close = difflib.get_close_matches(key, list(known.to_dict()), n=1)
            raise ValueError(
                f"config: {known.model_type} has no '{key}'." + (f" Did you mean '{close[0]}'?" if close else "")
            )


def _check_sizes(known: Any, spec: Spec) -> None:
    """Raise ValueError unless the tokenizer's ids and lengths fit."""
    if known.is_encoder_decoder:
        raise ValueError(f"a text encoder is needed, but {known.model_type} is an encoder with a decoder")
    if known.vocab_size < spec.vocab_size:
        raise ValueError(
            f"the tokenizer has {spec.vocab_size} ids, the text encoder {known.vocab_size}: use the tokenizer "
            "made for it"
        )
    # RoBERTa's family counts positions from after the pad's id
    shift = known.pad_token_id + 1 if "roberta" in known.model_type else 0
    positions = known.max_position_embeddings - shift
    if positions < spec.context_length:
        raise ValueError(
            f"tokenizer.context_length: {spec.context_length} is more than the text encoder's {positions} positions"
        )


def _create(weights: str | None, known: Any) -> Any:
    from transformers import AutoModel

    if weights is None:
        return AutoModel.from_config(known, trust_remote_code=False)
    try:
        return AutoModel.from_pretrained(weights, config=known, trust_remote_code=False, use_safetensors=True)
    except Exception as error:
        raise _unreachable(weights, "weights", error) from error


def _unreachable(model: str, what: str, error: Exception) -> UserError:
    """The hub's client, sockets and files raise many kinds of error; one line for all."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"model: the {what} of '{model}' cannot be loaded: {reason} Reach the hub once, give a folder, or use "
        "architecture and config"
    )
