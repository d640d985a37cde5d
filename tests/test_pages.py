"""The pages of docs/: they are made without a warning, and what they show is run as written, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ("start.md", "looking.md", "taking.md")
"""Pages that a reader goes through after a quickstart, and types."""
SHORT = ("data.train_samples=256", "data.validation_samples=64", "training.batch_size=32", "schedule.max_steps=4")
ELSEWHERE = ("python3 -m venv", "tensorboard", "cosmos-launch --config quickstart.yaml\n")
"""Lines that other tests run, or that do not end."""


class Links(HTMLParser):
    """What a page points at, and the places in it that can be pointed at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            elif name == "id" and value:
                self.places.add(value)


@pytest.mark.slow
def test_pages_are_made_and_every_link_within_them_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.resolve(): Links(path.read_text()) for path in tmp_path.rglob("*.html")}
    assert len(pages) > 20
    lost = []
    for path, page in pages.items():
        for target in page.targets:
            if re.match(r"[a-z]+:", target):
                continue
            file, _, place = target.partition("#")
            there = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not there.exists() or (place and there in pages and place not in pages[there].places):
                lost.append(f"{path.name}: {target}")
    assert not lost, lost


@pytest.mark.slow
def test_what_the_pages_show_runs_as_written(tmp_path: Path) -> None:
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*command: str, text: str | None = None) -> None:
        given = {"cwd": tmp_path, "env": environment, "input": text, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **given)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{text or command}\n{done.stdout}{done.stderr}"

    run("cosmos-launch", "--config", "quickstart.yaml", *SHORT)
    found = 0
    for name in RUN:
        for language, block in re.findall(
            r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.S | re.M
        ):
            lines = [line for line in block.splitlines(keepends=True) if not line.startswith(ELSEWHERE)]
            if lines:
                run(*(["bash", "-e"] if language == "bash" else ["python", "-"]), text="".join(lines))
                found += 1
    assert found >= 8
