"""What of a config readers elsewhere may see."""

import pytest

from cosmos_ssl.interop.recipe import without_places


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/data/me/cc3m-{0000..0575}.tar", ".../cc3m-{0000..0575}.tar"),
        ("~/cc3m", ".../cc3m"),
        ("s3://key:word@bucket/cc3m.tar?X-Signature=abc", "s3://bucket/cc3m.tar"),
        ("pipe:curl -H 'Authorization: Bearer x' https://host/a.tar", "pipe:..."),
        ("hf-hub:lab/small", "hf-hub:lab/small"),
        ("runs/old", "runs/old"),
        (0.5, 0.5),
    ],
)
def test_places_and_secrets_stay_here(given, told):
    config = {"output_dir": "/far/away", "data": {"train_data": [given], "api_key": "abc", "lr": 1}}
    assert without_places(config) == {"data": {"train_data": [told], "api_key": "...", "lr": 1}}
