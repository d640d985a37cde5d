"""What a program's inputs are made by: ``preprocessor_config.json`` for pictures, ``tokenizer.json`` for texts.

The first is that of transformers' image processors, the second that of the package tokenizers, with cutting and
padding in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from cosmos_ssl.api import TowerSpec
from cosmos_ssl.interop.files import write_json
from cosmos_ssl.interop.huggingface import clip_tokenizer
from cosmos_ssl.models.contract import is_built_in
from cosmos_ssl.models.encoder import ModelEncoder

PICTURES, TEXTS = "preprocessor_config.json", "tokenizer.json"
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""PIL's numbers."""
_PLAIN = ("a photo of a cat", "Two dogs, and 3 birds in the sky!", "", "many words, " * 60)
_ODD = ("a “curly” dog’s caf\u00e9", "salt &amp; pepper", "ﬁne  “mojibakeâ€\x9d")


def write(encoder: ModelEncoder, folder: Path) -> tuple[bool, list[str]]:
    """Write what the model has of both; whether texts have a file, and notes for people."""
    if encoder.model.image is not None:
        write_json(folder / PICTURES, pictures(encoder.model.image.spec))
    if encoder.model.text is None:
        return False, []
    made = _tokenizer(encoder)
    if made is None or not _same(encoder, made, _PLAIN):
        return False, [f"no {TEXTS} is written: give `tokens` the ids of this model's own tokenizer"]
    (folder / TEXTS).write_text(made.to_str() + "\n", encoding="utf-8")
    if _same(encoder, made, _ODD):
        return True, []
    return True, [
        f"{TEXTS} makes other tokens than this model was trained on of texts that need mending (wrong encodings, HTML "
        "entities, fullwidth letters): make them `html.unescape(html.unescape(ftfy.fix_text(text)))` first"
    ]


def pictures(spec: TowerSpec) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a tower: resized, cut out or squashed, mean and deviation."""
    square = {"height": spec.image_size, "width": spec.image_size}
    cut = {"size": {"shortest_edge": spec.image_size}, "do_center_crop": True, "crop_size": square}
    squashed = {"size": square, "do_center_crop": False}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _RESAMPLE[spec.interpolation],
        **(squashed if spec.resize == "squash" else cut),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _tokenizer(encoder: ModelEncoder) -> Any:
    """The model's tokenizer as one of the package tokenizers; None where it is of another kind."""
    from tokenizers import Tokenizer

    own = encoder.tokenizer
    if own is None:
        return None
    made = None
    if is_built_in(own, "tokenizers", "clip"):
        made = Tokenizer.from_str(clip_tokenizer())
    elif is_built_in(own, "tokenizers", "huggingface"):
        backend = getattr(cast(Any, own).library, "backend_tokenizer", None)
        made = None if backend is None else Tokenizer.from_str(backend.to_str())
    if made is None:
        return None
    made.enable_truncation(max_length=own.context_length)
    made.enable_padding(length=own.context_length, pad_id=own.pad_id, pad_token=made.id_to_token(own.pad_id))
    return made


def _same(encoder: ModelEncoder, made: Any, texts: tuple[str, ...]) -> bool:
    """Whether both make the same tokens of these texts."""
    assert encoder.tokenizer is not None
    found = [text.ids for text in made.encode_batch(list(texts))]
    return bool(found == encoder.tokenizer(list(texts))[0].tolist())
