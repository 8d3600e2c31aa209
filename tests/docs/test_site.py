"""The documentation site builds in strict mode: no dead link, no missing page, no unknown object."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recpress.trainer.cli import COMMANDS

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow  # builds the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_a_page_per_command(site: Path) -> None:
    for name in COMMANDS:
        assert (site / "reference" / "cli" / f"{name.replace(' ', '-')}.html").exists(), name
    train = (site / "reference" / "cli" / "train.html").read_text()
    assert "--stream.buffer-rows" in train
    assert "operate/resume.html" in train or "train/log.html" in train  # help texts link to pages


def test_pages_from_elsewhere_in_the_repository(site: Path) -> None:
    benchmarks = (site / "benchmarks.html").read_text()
    assert "how/stream.html" in benchmarks
    assert "../docs/" not in benchmarks
    assert (site / "contributing.html").exists()


def test_the_api_comes_from_docstrings(site: Path) -> None:
    api = (site / "reference" / "api.html").read_text()
    assert "Replace tables in the" in api
    assert '<span class="gp">&gt;&gt;&gt; </span>' in api  # examples as sessions of Python
    assert not re.search(r"<h\d[^>]*>[^<]*DistributedModelParallel", api)  # and not as Markdown


def test_nothing_is_requested_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        for start in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http', "fonts.googleapis"):
            assert start not in text, f"{page}: {start}"
