"""Small shards of one-coloured pictures, and an encoder that sees their colour and reads its name."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cosmos_ssl.api import Spec, TowerSpec

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


class ColourEncoder:
    """Pictures and texts as mean colours; a text is the sum of the colours in it."""

    spec = Spec(embed_dim=3, image=TowerSpec(width=3, image_size=8, patch_size=8))
    device = torch.device("cpu")

    def preprocess(self, image):
        assert image.dtype == torch.uint8
        return image[:, :8, :8].float() / 255

    def image_features(self, pixels):
        return pixels.mean((-2, -1))

    def encode_image(self, pixels, *, normalize=True):
        return F.normalize(self.image_features(pixels), dim=-1)

    def tokenize(self, texts):
        return torch.tensor([[name in text for name in COLOURS] for text in texts]).long()

    def match_image(self, pixels):
        return self.encode_image(pixels)

    def match_text(self, tokens):
        return self.encode_text(tokens)

    def match(self, images, texts):
        return images @ texts.T

    def encode_text(self, tokens, *, normalize=True):
        return F.normalize(tokens.float() @ torch.tensor(list(COLOURS.values())).float() / 255, dim=-1)


@pytest.fixture
def encoder():
    return ColourEncoder()


@pytest.fixture
def write_shard(tmp_path):
    """Write a shard: one sample for each (colour, members); None as colour is a broken picture."""

    def write(name, samples):
        with tarfile.open(tmp_path / name, "w") as tar:
            for number, (colour, members) in enumerate(samples):
                buffer = io.BytesIO(b"no picture")
                if colour is not None:
                    Image.new("RGB", (10, 9), COLOURS[colour]).save(buffer, "png")
                for extension, value in {"png": buffer.getvalue(), **members}.items():
                    data = (
                        value
                        if isinstance(value, bytes)
                        else value.encode()
                        if isinstance(value, str)
                        else json.dumps(value).encode()
                    )
                    info = tarfile.TarInfo(f"{number:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return str(tmp_path / name)

    return write


@pytest.fixture
def spec():
    return Spec(embed_dim=3)
