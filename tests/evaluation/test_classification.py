"""Templates, class names, class vectors and accuracy."""

import pytest
import torch
from torch.nn import functional as F

from cosmos_ssl.evaluation.classification import accuracy, class_vectors, load_class_names, load_templates
from cosmos_ssl.evaluation.features import Job


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
    # class 0: 1 of 1, class 1: 0 of 1, class 2: 1 of 2 (equal scores are no hit)
    assert found == pytest.approx({"top1": 0.5, "top5": 1.0, "mean_per_class_top1": 0.5})
    many = torch.arange(10.0).repeat(3, 1)
    assert accuracy(many, torch.tensor([9, 5, 4]))["top5"] == pytest.approx(2 / 3)
    assert accuracy(scores, torch.tensor([0, -1, 2, 2]))["top1"] == pytest.approx(0.5)
    assert accuracy(scores * torch.nan, torch.tensor([0, 1, 2, 2]))["top1"] == 0


def test_openai_templates_and_imagenet_names():
    templates = load_templates("openai")
    assert len(templates) == 80
    assert templates[0] == "a bad photo of a {}."
    assert all(template.count("{}") == 1 for template in templates)
    assert len(load_class_names("imagenet")) == 1000


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
