"""A model repository of Triton: a folder with `config.pbtxt` for each program."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "model_repository"
"""Not `triton`: next to `load.py` it would hide the package of that name."""
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}
_PYTHON_MODEL = Path(__file__).with_name("triton_model.py")


def write_repository(folder: Path, programs: Mapping[str, Any]) -> dict[str, str]:
    """Write the repository into the export `folder`; program -> its backend.

    A compiled program without large tensors runs in the PyTorch backend (platform `torch_aoti`, since Triton 26.03).
    Others run in the Python backend, which loads them with `load.py` from the export around the repository.
    """
    found = {}
    for name, spec in programs.items():
        compiled = spec["aot"] is not None and not spec["large"]
        version = folder / FOLDER / name / "1"
        version.mkdir(parents=True)
        if compiled:
            _link(folder / spec["aot"]["file"], version / "model.pt2")
        else:
            (version / "model.py").write_bytes(_PYTHON_MODEL.read_bytes())
        cuda = spec["aot"] is not None and spec["aot"]["device"] == "cuda"
        text = _config(name, spec, compiled, "KIND_GPU" if cuda else "KIND_CPU")
        (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        found[name] = "torch_aoti" if compiled else "python"
    return found


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # some filesystems have no hard links
        shutil.copyfile(source, target)


def _config(name: str, spec: Mapping[str, Any], compiled: bool, kind: str) -> str:
    """The text of `config.pbtxt`: the schema is model_config.proto of Triton."""
    backend = 'backend: "pytorch"\nplatform: "torch_aoti"' if compiled else 'backend: "python"'
    inputs = [
        _tensor("input", f"INPUT__{place}" if compiled else part["name"], part["dtype"], part["shape"])
        for place, part in enumerate(spec["inputs"])
    ]
    output = _tensor("output", "OUTPUT__0" if compiled else "output", spec["output"]["dtype"], spec["output"]["shape"])
    group = f"instance_group {{\n  kind: {kind}\n  count: 1\n}}"
    # The client batches: the first dimension of a tensor is the batch, or the ids in all lists of a feature.
    return "\n".join([f"name: {json.dumps(name)}", backend, "max_batch_size: 0", *inputs, output, group, ""])


def _tensor(field: str, name: str, dtype: str, shape: list[int | str]) -> str:
    dims = "".join(f"\n  dims: {-1 if isinstance(size, str) else size}" for size in shape)
    return f"{field} {{\n  name: {json.dumps(name)}\n  data_type: {_TYPES[dtype]}{dims}\n}}"
