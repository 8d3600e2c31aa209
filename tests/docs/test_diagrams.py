"""The committed diagrams are those that scripts/docs_diagrams.py draws, from the numbers of benchmarks/README.md."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def diagrams() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_diagrams", ROOT / "scripts" / "docs_diagrams.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["flow.svg", "step.svg", "window.svg", "quality.svg"])
def test_committed_diagrams_are_up_to_date(name: str, diagrams: ModuleType) -> None:
    drawn = diagrams.DIAGRAMS[name]()
    ElementTree.fromstring(drawn)
    assert (ROOT / "docs" / "img" / name).read_text() == drawn, "run python scripts/docs_diagrams.py"


def test_every_diagram_is_checked(diagrams: ModuleType) -> None:
    assert {path.name for path in (ROOT / "docs" / "img").iterdir()} == set(diagrams.DIAGRAMS)


def test_numbers_of_the_plot(diagrams: ModuleType) -> None:
    measured = diagrams.measured()
    assert measured["Beauty"] == [(100.0, 100.0), (24.8, 98.9), (9.7, 96.4), (4.5, 95.4)]
    assert len(measured["MovieLens-1M"]) == 5
