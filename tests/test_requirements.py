"""The pinned lists: hashes for everything but the builds that differ between indexes, and no address of an index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recpress.trainer.versions import KNOWN_SETS

FOLDER = Path(__file__).resolve().parents[1] / "requirements"
LOCKED = sorted(path.stem for path in FOLDER.glob("*.in") if path.stem not in ("overrides", "torch-cuda"))


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)==([^\s\\]+)", (FOLDER / f"{name}.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", LOCKED)
def test_every_pin_of_a_locked_list_has_hashes_and_the_versions_of_the_runtime(name: str) -> None:
    text = (FOLDER / f"{name}.txt").read_text()
    requirements = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(requirements) == len(pins(name)) > 1
    assert all("--hash=sha256:" in requirement for requirement in requirements)
    runtime = pins("runtime")
    assert {
        package: version for package, version in pins(name).items() if runtime.get(package, version) != version
    } == {}
    assert not {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"} & pins(name).keys()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*")), ids=lambda path: path.name)
def test_no_list_names_an_index(path: Path) -> None:
    assert not re.search(r"://|index-url|find-links", path.read_text())


@pytest.mark.parametrize(("name", "fbgemm"), [("torch-cpu", "fbgemm-gpu-cpu"), ("torch-cuda", "fbgemm-gpu")])
def test_the_torch_lists_are_the_newest_known_set(name: str, fbgemm: str) -> None:
    found = {package: version.rpartition(".")[0] for package, version in pins(name).items()}
    newest = KNOWN_SETS[0]
    assert (found["torch"], found["torchrec"], found[fbgemm]) == tuple(newest.values())
