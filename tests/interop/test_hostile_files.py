"""Files of weights that were changed by chance or on purpose: read, or refused in a sentence before they take time or
memory.
"""

import io
import json
import pickle
import random
import time
import zipfile
from itertools import islice

import open_clip
import pytest
import torch
from safetensors.torch import save

import cosmos_ssl
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.files import read_safetensors, read_torch_file
from cosmos_ssl.interop.foreign import foreign_roles, read_foreign

HEADS = ["model.image.heads=2", "model.text.heads=2"]


@pytest.fixture(scope="module")
def state():
    """A model of OpenCLIP's, as small as can be."""
    vision = {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8}
    torch.manual_seed(0)
    model = open_clip.CLIP(8, vision, {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1})
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def packed(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def test_the_sound_model_is_read(state, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(save(state))
    (tmp_path / "a.pt").write_bytes(packed(state))
    for name in ("a.safetensors", "a.pt"):
        assert cosmos_ssl.load(tmp_path / name, overrides=HEADS).spec.embed_dim == 8


# ---------------------------------------------------------------------------- tensors that are no weights


def changed(name, change):
    return lambda state: {**state, name: change(state[name])}


PROJ = "visual.proj"
WEIGHTS = {
    "whole numbers": (
        changed(PROJ, torch.Tensor.long),
        "image.projection is of torch.int64; weights are dense, of 32 or 16 bits",
    ),
    "64 bits": (changed(PROJ, torch.Tensor.double), "image.projection is of torch.float64"),
    "complex": (changed("logit_scale", lambda x: x + 0j), "losses.clip.logit_scale is of torch.complex64"),
    "8 bits": (changed(PROJ, lambda x: x.to(torch.float8_e4m3fn)), "image.projection is of torch.float8_e4m3fn"),
    "sparse": (
        changed(PROJ, torch.Tensor.to_sparse),
        r"image.projection is a tensor of another kind \(torch.sparse_coo\)",
    ),
    "nowhere": (changed(PROJ, lambda x: x.to("meta")), r"image.projection is a tensor of another kind \(meta\)"),
    "quantised": (
        changed(PROJ, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        "a tensor of another kind",
    ),
    "one number for a million": (
        changed("token_embedding.weight", lambda x: torch.zeros(1).expand(1 << 40, 8)),
        "text.token_embedding.weight is of 8,796,093,022,208 numbers, 4 bytes of which are stored",
    ),
    "keys that are numbers": (
        lambda state: dict(enumerate(state.values())),
        "no official COSMOS checkpoint: it has neither",
    ),
    "block 999999999": (
        lambda state: {**state, "visual.transformer.resblocks.999999999.ln_1.weight": torch.ones(8)},
        "visual.transformer.resblocks.999999999.ln_1.weight has no place",
    ),
    "block 9999": (
        lambda state: {**state, "transformer.resblocks.9999.ln_1.bias": torch.ones(8)},
        "resblocks.1.ln_1.weight is missing",
    ),
    "block #": (
        lambda state: {**state, "transformer.resblocks.#.ln_1.bias": torch.ones(8)},
        "resblocks.#.ln_1.bias has no place",
    ),
    "no width": (
        changed(PROJ, lambda x: x[:0]),
        r"the sizes of the model cannot be told from its tensors \(one of them is empty\)",
    ),
    "no dimensions": (
        changed("visual.conv1.weight", lambda x: x[0, 0, 0, 0]),
        "the sizes of the model cannot be told from its tensors",
    ),
    "a wide one beside": (
        changed(PROJ, lambda x: torch.zeros(1 << 16, 1)),
        r"does not fit the model: image.class_token is \[8\], the model's",
    ),
    "not a number": (changed("ln_final.bias", lambda x: x.log()), "text.norm.bias holds a NaN or an infinity"),
    "bent sizes": (
        lambda state: {"student": {}, "cosmos_ssl.sizes": 3},
        "the sizes of the model cannot be told|is missing",
    ),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_tensors_that_are_no_weights(state, tmp_path, change, message):
    path, start = tmp_path / "x.pt", time.monotonic()
    path.write_bytes(packed(change(state)))
    with pytest.raises(CheckpointError, match=message) as error:
        cosmos_ssl.load(path, overrides=HEADS)
    assert "\n" not in str(error.value) and time.monotonic() - start < 60


@pytest.mark.parametrize(
    "sizes",
    ["[", "3", '{"model.image.heads": 0}', '{"model.image.heads": 1.5}', '{"model.text.heads": "x"}', "[" * 10**5],
)
def test_sizes_that_are_none(state, tmp_path, sizes):
    (tmp_path / "x.safetensors").write_bytes(save(state, {"cosmos_ssl.sizes": sizes}))
    with pytest.raises(CheckpointError, match=r"x.safetensors: 'cosmos_ssl.sizes' holds no sizes"):
        cosmos_ssl.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([], "holds no table"),
        ({"model_cfg": 3}, "model_cfg is no table"),
        (
            {"model_cfg": {"vision_cfg": [], "text_cfg": {}}, "preprocess_cfg": "x"},
            "preprocess_cfg is no table; vision_cfg is no table",
        ),
        (
            {"model_cfg": {"vision_cfg": {"head_width": 0}, "text_cfg": {"heads": "x"}}},
            "vision_cfg.head_width: 0; text_cfg.heads: x",
        ),
        ({"model_cfg": {"vision_cfg": {"image_size": {}}}}, "vision_cfg.image_size: {}"),
        ({"preprocess_cfg": {"mean": 3}}, "preprocess_cfg.mean: 3"),
    ],
)
def test_bent_configs_of_openclip(state, tmp_path, told, message):
    (tmp_path / "open_clip_model.safetensors").write_bytes(save(state))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=message):
        cosmos_ssl.load(tmp_path)


# ---------------------------------------------------------------------------- files


def headed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HEADERS = {
    "a million tensors": headed(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    ),
    "length of exabytes": (1 << 62).to_bytes(8, "little") + b"{}",
    "cut length": b"\x00\x00",
    "terabytes": headed({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"\0" * 64),
    "product that overflows": headed({"a": {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 0]}}),
    "negative": headed({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
    "unknown type": headed({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "deep": headed(b'{"a":' * 100_000),
    "nothing": headed(b""),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_headers(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"x.safetensors cannot be read: .") as error:
        read_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value) and time.monotonic() - start < 60


def repacked(data, change, compression=zipfile.ZIP_STORED):
    """The archive of a torch file with its pickle changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return file.getvalue()


def test_archives_that_grow(tmp_path):
    (tmp_path / "x.pt").write_bytes(
        repacked(packed({"a": torch.zeros(1 << 20)}), lambda data: data, zipfile.ZIP_DEFLATED)
    )
    with pytest.raises(
        CheckpointError, match=r"x.pt cannot be read as a torch file: .* is compressed, which torch.save does not do"
    ):
        read_torch_file(tmp_path / "x.pt")


def test_more_numbers_than_an_archive_holds(tmp_path):
    data = repacked(
        packed({"a": torch.ones(4)}), lambda data: data.replace(b"K\x04", b"J\x00\x00\x00\x40")
    )  # a thousand million
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x.pt cannot be read as a torch file: ."):
        read_torch_file(tmp_path / "x.pt")


def attempt(path):
    """Read, or refused (-1) in a sentence; anything else is a fault."""
    try:
        foreign_roles(path)
        found = read_foreign(path, "student")
        return 0 if found is None else sum(float(value.double().sum()) != 0 for value in found.state.values())
    except CheckpointError as error:
        assert "\n" not in str(error)
        return -1


def mutated(data, limit, rng):
    """A few changes of the first ``limit`` bytes: bits, bytes, numbers, cut out, repeated."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(limit, len(data)))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b'\x00\xff"{}[],:0129-.eQRtc')
        elif kind == 2:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 8)]
        else:
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\x7f", b"9999", b"-111", b"\x00\x00\x00\x00"))
    return bytes(data)


def changes(state, form, rng):
    """Without end: a file with changes anywhere, and one whose header or pickle alone is changed."""
    small = {**state, "token_embedding.weight": torch.ones(32, 8)}
    if form == ".safetensors":
        sound = save(small)
        length = 8 + int.from_bytes(sound[:8], "little")
        while True:
            yield mutated(sound, length, rng)
            yield headed(mutated(sound[8:length].strip(), length, rng), sound[length:])
    sound, old = (
        packed({"name": "x", "state_dict": small}, _use_new_zipfile_serialization=new) for new in (True, False)
    )
    while True:
        yield mutated(sound, len(sound), rng)
        yield repacked(sound, lambda data: mutated(data, len(data), rng))
        yield mutated(old, len(old), rng)


def fuzz(state, path, seed, count):
    refused = 0
    for data in islice(changes(state, path.suffix, random.Random(seed)), count):
        path.unlink(missing_ok=True)  # a new file: what was read before may still be mapped
        path.write_bytes(data)
        refused += attempt(path) < 0
    assert refused > count / 4


@pytest.mark.parametrize(("name", "count"), [("x.safetensors", 300), ("x.pt", 60)])
def test_mutated_files(state, tmp_path, name, count):
    fuzz(state, tmp_path / name, 1, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_mutated_files(state, tmp_path, name, seed):
    fuzz(state, tmp_path / name, seed, 2000)


def test_pickles_that_ask_for_code(tmp_path):
    class Call:
        def __init__(self, *what):
            self.what = what

        def __reduce__(self):
            return self.what[0], self.what[1:]

    for call in (Call(open, str(tmp_path / "made"), "w"), Call(eval, "1"), Call(exec, "1")):
        (tmp_path / "x.pt").write_bytes(repacked(packed({}), lambda _, call=call: pickle.dumps({"student": call})))
        with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
            cosmos_ssl.load(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()
