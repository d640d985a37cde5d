"""Tables and rows of evaluations; the published figures are those of the README."""

import argparse
import re
import shlex
from pathlib import Path

import torch

from cosmos_ssl.cli.common import parse
from cosmos_ssl.cli.eval import add_parser
from cosmos_ssl.evaluation.bootstrap import Outcome
from cosmos_ssl.evaluation.comparison import comparison, comparison_rows
from cosmos_ssl.evaluation.report import PUBLISHED, markdown, metric_rows, notes, suite_rows
from cosmos_ssl.evaluation.segmentation_sets import KNOWN
from cosmos_ssl.evaluation.suite import Item
from cosmos_ssl.evaluation.task_names import ALL
from cosmos_ssl.evaluation.tasks import TASKS, Found
from cosmos_ssl.interop.hub import RELEASED


def test_published_figures_are_the_readmes():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ((?:[\d.]+ / [\d.]+ \| ){4}[\d.]+ / [\d.]+) \|$", readme, re.MULTILINE)
    assert {f"cosmos_vitb{patch}_{data}" for data, _ in rows for patch in (16, 32)} == set(PUBLISHED) == set(RELEASED)
    for data, cells in rows:
        for patch, figures in zip(
            (16, 32), zip(*(cell.split(" / ") for cell in cells.split(" | ")), strict=True), strict=True
        ):
            sets = PUBLISHED[f"cosmos_vitb{patch}_{data}"]
            ours = [*sets["coco"].values(), *sets["flickr30k"].values(), *sets["imagenet"].values()]
            assert ours == [float(figure) for figure in figures]


def test_rows():
    metrics = {"student/a_R@1": 0.25, "student/a_mean_rank": 7.25, "teacher/a_R@1": 0.5}
    assert metric_rows(metrics) == [
        ("METRIC", "STUDENT", "TEACHER"),
        ("a_R@1 (%)", "25.00", "50.00"),
        ("a_mean_rank", "7.2", "-"),
    ]


def test_markdown_beside_the_published_row():
    metrics = {
        f"{role}/{way}_R@1": 0.5 for role in ("student", "teacher") for way in ("image_to_text", "text_to_image")
    }
    lines = markdown("cosmos_vitb16_cc3m", "coco", metrics).splitlines()
    assert (
        lines[0] == "|  | coco image_to_text_R@1 (%) | coco text_to_image_R@1 (%) |"
        and lines[1] == "| --- | --- | --- |"
    )
    assert lines[2].endswith("| 53.1 | 40.1 |") and lines[3:] == [
        "| cosmos_vitb16_cc3m, student | 50.0 | 50.0 |",
        "| cosmos_vitb16_cc3m, teacher | 50.0 | 50.0 |",
    ]
    assert not markdown("my_run", "coco", metrics) and not markdown("cosmos_vitb16_cc3m", "", metrics)


def test_the_page_tells_of_every_task_and_set():
    page = (Path(__file__).parents[2] / "cosmos_ssl" / "evaluation" / "README.md").read_text()
    assert all(f"`{name}`" in page for name in (*TASKS, *KNOWN))
    assert notes("linear_probe", "sun397")[1].startswith("all pictures") and not notes("retrieval", "coco")


def test_the_commands_of_the_page_are_understood():
    page = (Path(__file__).parents[2] / "cosmos_ssl" / "evaluation" / "README.md").read_text()
    block = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1]
    commands = [shlex.split(line.partition("cosmos-ssl ")[2]) for line in block.splitlines()]
    assert len(commands) == 5
    for words in commands:
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_parser(parser.add_subparsers())
        arguments = parse(parser, words)
        assert arguments.task in (*TASKS, ALL) and not arguments.overrides
        assert (arguments.checkpoint is None) == (len(arguments.compare) > 1)


def test_the_table_of_all_sets():
    """The probe of a set has no published figure beside it, which are zero-shot; another set's stays blank."""
    about = {"roles": ["student"], "set": "cars", "metrics": {"student/top1": 0.5}}
    coco = {"student/text_to_image_R@1": 0.25, "student/1k/text_to_image_R@1": 0.75}
    reports = [{**about, "task": task} for task in ("classification", "linear_probe")]
    reports.append({"roles": ["student"], "task": "retrieval", "set": "coco", "metrics": coco})
    assert suite_rows(reports)[1:] == [
        ("classification", "cars", "top1", "50.00", "", "88.5", "90.8"),
        ("linear_probe", "cars", "top1", "50.00", "", "", ""),
        ("retrieval", "coco", "text_to_image_R@1", "25.00", "52.5", "", ""),
        ("retrieval", "coco", "1k/text_to_image_R@1", "75.00", "", "", ""),
    ]


def test_models_that_saw_other_samples_are_not_paired():
    """Two of four right against three of four, drawn alike only where the samples are the same ones."""

    def found(keys, right):
        outcome = Outcome(torch.arange(4), torch.arange(4) < right, torch.ones(4))
        return {Item("knn", None, "x"): Found({"top1": right / 4, "top5": 1.0}, 4, {"top1": outcome}, keys)}

    a, b, c = comparison({"a": found("wxyz", 2), "b": found("wxyz", 3), "c": found("wxyv", 3)})
    assert (a.value, a.difference, b.difference, b.paired, c.paired) == (0.5, None, 0.25, True, False)
    assert b.difference_interval[0] == 0 > c.difference_interval[0]  # paired, b is right wherever a is
    rows = comparison_rows([row._asdict() for row in (a, b)])
    assert rows[2][3:5] == ("b", "75.00") and rows[2][6:] == ("+25.00", "0.00 to 75.00", "yes")
