"""Names of classes against folders: by name, by number, by place, and never shifted."""

import pytest

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation.naming import in_order_of_folders, repeated, spoken


def test_folders_as_words():
    assert [spoken(name) for name in ("red_fox", "a  b", "cat", "__")] == ["red fox", "a b", "cat", "__"]


@pytest.mark.parametrize(
    ("names", "folders", "expected"),
    [
        (["b", "a"], ["a", "b"], ["a", "b"]),
        (["c", "B_x", "a"], ["a", "b x"], ["a", "B_x", "c"]),
        (["x", "y"], ["a", "b"], ["x", "y"]),
        (["cat", "cat"], ["a", "b"], ["cat", "cat"]),
        (
            [f"n{n}" for n in range(12)],
            sorted(str(n) for n in range(12)),
            ["n0", "n1", "n10", "n11", *(f"n{n}" for n in range(2, 10))],
        ),
        (
            [f"n{n}" for n in range(1, 11)],
            sorted(str(n) for n in range(1, 11)),
            ["n1", "n10", *(f"n{n}" for n in range(2, 10))],
        ),
        (["n0", "n1", "n2"], ["1", "2"], ["n1", "n2", "n0"]),  # the set has a class 0, this folder has no picture of it
    ],
)
def test_orders(names, folders, expected):
    assert in_order_of_folders(names, folders, "names.txt") == expected


@pytest.mark.parametrize(
    ("names", "folders", "message"),
    [
        (["b", "x"], ["a", "b"], "names.txt: name 1, 'b', stands in the place of the class folder 'a'"),
        (["a", "c"], ["a", "b", "c"], "names.txt: 2 class names are given for 3 classes"),
        (
            ["x", "y", "z"],
            ["0", "2", "5"],
            "names.txt: 3 class names are given, and class folders are called by numbers up to 5",
        ),
        (["x", "y"], ["1", "01"], "called by numbers"),
    ],
)
def test_what_would_shift_labels(names, folders, message):
    with pytest.raises(DataError, match=message):
        in_order_of_folders(names, folders, "names.txt")


def test_repeated_names_are_told():
    assert not repeated(["a", "b"])
    assert (
        repeated(["a", "b", "a"])
        == "'a' is the name of classes 0 and 2: their scores are equal, and the first of them counts"
    )
    assert repeated([*"abcdabcd"]).startswith(
        "'a' is the name of classes 0 and 4, 'b'"
    ) and ", and 1 more: " in repeated([*"abcdabcd"])
