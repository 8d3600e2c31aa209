"""The C++ of docs/serve.md is compiled and runs the program that AOTInductor compiled; so does Python."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from recpress.trainer.cli import main
from recpress.trainer.export.loader import load
from tests.docs.served import exported

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
TORCH = Path(torch.__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler"),
]


def test_the_compiled_program_gives_the_vectors_of_the_other(capfd):
    folder = exported() / "export"
    plain, compiled = (load(folder, "item", aot=aot) for aot in (False, True))
    for size in (0, 1, 100):
        ids = torch.arange(size) - 1
        assert torch.allclose(plain(ids), compiled(ids), atol=1e-6)
    assert main(["export", "--check", str(folder)]) == 0
    assert "item (AOT): largest difference" in capfd.readouterr().out


def test_triton_finds_a_tuple_of_tensors_in_the_compiled_program():
    folder = exported() / "export"
    package = torch._inductor.aoti_load_package(str(folder / "model_repository" / "user" / "1" / "model.pt2"))
    given, result = (json.loads(spec)[1] for spec in package.loader.get_call_spec())
    assert given["type"] == "builtins.tuple"
    assert [part["type"] for part in given["children_spec"]] == ["builtins.tuple", "builtins.dict"]
    assert len(given["children_spec"][0]["children_spec"]) == 1
    assert result["type"] is None


def test_the_program_in_cpp_runs(tmp_path):
    text = PAGE.read_text()
    (tmp_path / "serve.cpp").write_text(re.search(r"```cpp\n(.*?)```", text, re.DOTALL)[1])
    command = re.search(r"^(g\+\+ .*)$", text, re.MULTILINE)[1]
    subprocess.run(f"TORCH={TORCH}; {command}", shell=True, check=True, cwd=tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "export").symlink_to(exported() / "export")
    said = subprocess.run(["./a.out"], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert said.strip() == "[2, 12]"
