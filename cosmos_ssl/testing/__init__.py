"""Checks that this project's own parts pass, for the tests of your package; and what such tests are made of.

::

    from cosmos_ssl.testing import check_loss, small_run

    def test_contract():
        check_loss("my-losses:triplet", margin=0.5)  # a registered name or a class, and its options

    def test_training(tmp_path):  # seconds, on the CPU
        rows = small_run(tmp_path, {"losses": {"triplet": {"type": "triplet"}}}, steps=24)
        start, end = (sum(row["loss/triplet"] for row in part) for part in (rows[:6], rows[-6:]))  # crops differ
        assert end < start

A check builds the part into a small model with towers, heads, losses and a teacher (``example_config``), and runs it as
training would. What breaks the contract is an AssertionError that names the part.

If cosmos-ssl and your package offer components of one name, the name means yours here, with a warning. A class always
means itself.
"""

from cosmos_ssl.testing.checks import (
    check_augmenter,
    check_callback,
    check_head,
    check_loss,
    check_optimizer,
    check_options,
    check_schedule,
    check_teacher,
    check_tower,
    check_writer,
    small_run,
)
from cosmos_ssl.testing.examples import (
    example_config,
    example_context,
    example_features,
    example_samples,
    example_spec,
    example_views,
)

__all__ = [
    "check_augmenter",
    "check_callback",
    "check_head",
    "check_loss",
    "check_optimizer",
    "check_options",
    "check_schedule",
    "check_teacher",
    "check_tower",
    "check_writer",
    "example_config",
    "example_context",
    "example_features",
    "example_samples",
    "example_spec",
    "example_views",
    "small_run",
]
