"""Tables and rows of evaluations; the published figures are those of the README."""

import argparse
import re
import shlex
from pathlib import Path

from cosmos_ssl.cli.common import parse
from cosmos_ssl.cli.eval import add_parser
from cosmos_ssl.evaluation.report import PUBLISHED, markdown, metric_rows, notes
from cosmos_ssl.evaluation.segmentation_sets import KNOWN
from cosmos_ssl.evaluation.tasks import TASKS
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
    assert len(commands) == 3
    for words in commands:
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_parser(parser.add_subparsers())
        arguments = parse(parser, words)
        assert arguments.task in TASKS and arguments.checkpoint and not arguments.overrides
