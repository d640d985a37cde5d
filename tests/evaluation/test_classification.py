"""Templates, class names, class vectors and accuracy."""

import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cosmos_ssl.evaluation.classification import accuracy, class_vectors, load_class_names, load_templates
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.naming import repeated
from cosmos_ssl.evaluation.segmentation_sets import read_class_names


class Words:
    """A text encoder that knows its vectors by heart."""

    device = torch.device("cpu")

    def __init__(self, vectors):
        self.vectors = vectors
        self.batches = []

    def tokenize(self, texts):
        self.batches.append(list(texts))
        return torch.tensor([[list(self.vectors).index(text)] for text in texts])

    def encode_text(self, tokens):
        return F.normalize(torch.stack([torch.tensor(list(self.vectors.values())[i]) for i in tokens[:, 0]]), dim=-1)


def test_class_vector_is_the_normalised_mean_of_normalised_templates():
    encoder = Words({"a cat": [3.0, 0.0], "one cat": [0.0, 5.0], "a dog": [0.0, -1.0], "one dog": [0.0, -9.0]})
    vectors = class_vectors(encoder, ["cat", "dog"], ["a {}", "one {}"], Job(batch_size=2))
    torch.testing.assert_close(vectors, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))
    assert [len(batch) for batch in encoder.batches] == [2, 2]


def test_accuracy_hand_worked():
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 2, 3], [0, 0, 0]])
    found = accuracy(scores, torch.tensor([0, 1, 2, 2]))
    # class 0: 1 of 1, class 1: 0 of 1, class 2: 1 of 2 (of equal scores the earlier classes come first)
    assert found == pytest.approx({"top1": 0.5, "top5": 1.0, "mean_per_class_top1": 0.5})
    many = torch.arange(10.0).repeat(3, 1)
    assert accuracy(many, torch.tensor([9, 5, 4]))["top5"] == pytest.approx(2 / 3)
    assert accuracy(scores, torch.tensor([0, -1, 2, 2]))["top1"] == pytest.approx(0.5)
    assert accuracy(scores * torch.nan, torch.tensor([0, 1, 2, 2]))["top1"] == 0


def test_equal_scores_are_in_the_order_of_classes():
    """As in a stable sort by falling score."""
    torch.manual_seed(0)
    scores, labels = torch.randint(0, 3, (200, 9)).float(), torch.randint(0, 9, (200,))
    ranks = (scores.argsort(dim=1, descending=True, stable=True) == labels[:, None]).int().argmax(1)
    found = accuracy(scores, labels)
    assert found["top1"] == pytest.approx((ranks < 1).double().mean().item()) and found["top1"] > 0.1
    assert found["top5"] == pytest.approx((ranks < 5).double().mean().item())
    nothing = torch.full((2, 9), -torch.inf)  # of nine classes none was found: none is among the first five
    assert accuracy(nothing, torch.tensor([0, 8]))["top5"] == 0


def test_openai_templates_and_imagenet_names():
    templates = load_templates("openai")
    assert len(templates) == 80
    assert templates[0] == "a bad photo of a {}."
    assert all(template.count("{}") == 1 for template in templates)
    assert len(load_class_names("imagenet")) == 1000
    assert (
        load_templates("openclip_simple")[:2] == ["itap of a {}.", "a bad photo of the {}."]
        and len(load_templates("openclip_simple")) == 7
    )
    assert "'missile' is the name of classes 657 and 744, 'sunglasses'" in repeated(load_class_names("imagenet"))


def test_given_templates():
    assert load_templates(["a {}"]) == ["a {}"]
    assert load_templates("the {} here") == ["the {} here"]
    for wrong in ("opnai", ["a {}", "a cat"], []):
        with pytest.raises(ValueError, match=r"^templates: .*simple, openai"):
            load_templates(wrong)


def test_class_names_of_a_file(tmp_path):
    (tmp_path / "names").write_text("cat\n\n  red fox \n")
    assert load_class_names(str(tmp_path / "names")) == ["cat", "red fox"]
    with pytest.raises(ValueError, match=r"class_names: .*nothing cannot be read: No such file"):
        load_class_names(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="at least 2"):
        load_class_names(["cat"])
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfcat\r\nred fox\r\n")
    assert load_class_names(str(tmp_path / "names")) == ["cat", "red fox"]


def test_class_names_of_what_is_no_such_file(tmp_path):
    (tmp_path / "one").write_text("cat\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xd8\xff\xe0")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("one", "one holds 1, at least 2 are needed"),
        ("empty", "empty holds 0, at least 2"),
        ("binary", r"binary cannot be read: it is no text \(UTF-8\)"),
        ("pipe", "pipe is no regular file, where a text file is due"),
        ("", "is a folder, where a text file is due"),
    ):
        for read, option in (
            (load_class_names, "class_names"),
            (lambda path: read_class_names(Path(path)), "--class-names"),
        ):
            if name not in ("one",) or read is load_class_names:
                with pytest.raises(ValueError, match=f"^{option}: .*(?:{message}|names no class)"):
                    read(str(tmp_path / name))
