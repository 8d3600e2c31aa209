"""Runs the programs of this folder. It needs torch, and nothing of recpress.

    from load import load

    program = load("path/of/this/folder", "user")  # aot=True: the program that AOTInductor compiled
    vectors = program(torch.tensor([0, 7]))        # in the order of the inputs in manifest.json, or a dict by name

`python load.py` runs all programs on the golden batch and compares the results.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def load(folder: str | Path, name: str, *, aot: bool = False) -> Callable[..., torch.Tensor]:
    """The program `name` of the export in `folder`: a function from tensors to a tensor.

    Raises ValueError for a missing program and, when called, for inputs that do not fit the manifest.
    """
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    if name not in manifest["programs"]:
        raise ValueError(f"{folder}: no program {name!r}; it has {', '.join(manifest['programs'])}")
    spec = manifest["programs"][name]
    compiled = spec["aot"]
    if aot and compiled is None:
        raise ValueError(f"{folder}: program {name!r} is not compiled; export it with --aot")
    device = torch.device(compiled["device"] if aot else "cpu")
    large = [_mapped(folder / part["file"], part).to(device) for part in spec["large"]]
    run: Callable[..., torch.Tensor]
    if aot:
        run = torch._inductor.aoti_load_package(str(folder / compiled["file"]))
    else:
        run = torch.export.load(str(folder / spec["file"])).module()

    def program(*given: Any) -> torch.Tensor:
        named = given[0] if len(given) == 1 and isinstance(given[0], dict) else None
        inputs = _checked(name, spec, given if named is None else [named.get(part["name"]) for part in spec["inputs"]])
        with torch.no_grad():
            return run(*(tensor.to(device) for tensor in inputs), *large).cpu()

    return program


def _mapped(path: Path, part: dict[str, Any]) -> torch.Tensor:
    """A tensor in a file, as a memory map."""
    dtype = getattr(torch, part["dtype"])
    if not path.is_file() or path.stat().st_size != math.prod(part["shape"]) * dtype.itemsize:
        raise ValueError(f"{path}: missing or incomplete; expected {part['dtype']} {part['shape']}")
    size = math.prod(part["shape"])
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(part["shape"])


def _checked(name: str, spec: dict[str, Any], given: Sequence[Any]) -> Sequence[torch.Tensor]:
    """The inputs, if their number, types and shapes fit."""
    wanted = spec["inputs"]
    sizes: dict[str, int] = {}
    if len(given) != len(wanted):
        raise ValueError(f"{name}: {len(given)} inputs, expected {', '.join(part['name'] for part in wanted)}")
    for tensor, part in zip(given, wanted, strict=True):
        where = f"{name}: input {part['name']!r}"
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != getattr(torch, part["dtype"]):
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else "missing" if tensor is None else type(tensor)
            raise ValueError(f"{where} is {found}, expected a tensor of {part['dtype']}")
        if tensor.dim() != 1:
            raise ValueError(f"{where} has shape {tuple(tensor.shape)}, expected ({part['shape'][0]},)")
        size, most = tensor.shape[0], spec["max"][part["shape"][0]]
        if sizes.setdefault(part["shape"][0], size) != size:
            raise ValueError(f"{where} has {size} rows, other inputs {sizes[part['shape'][0]]}")
        if size > most:
            raise ValueError(f"{where} has {size} values, expected at most {most}; split the batch")
    for part in wanted:
        if part["shape"][0] == "batch" and part.get("values"):
            lengths = given[wanted.index(part)]
            if lengths.numel() and int(lengths.min()) < 0:
                raise ValueError(f"{name}: input {part['name']!r} has a negative length")
            total, size = int(lengths.sum()), sizes[part["values"]]
            if total != size:
                raise ValueError(f"{name}: input {part['name']!r} adds up to {total}, but there are {size} values")
    return given


def replay(folder: str | Path) -> tuple[dict[str, float], float]:
    """Run all programs on the golden batch; the largest differences by name, relative to the largest output."""
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    golden = torch.load(folder / manifest["golden"]["file"], weights_only=True)
    differences = {}
    for name, spec in manifest["programs"].items():
        batch = golden[name]
        for aot in (False, True)[: 1 + (spec["aot"] is not None)]:
            found = load(folder, name, aot=aot)(batch["inputs"])
            if found.shape != batch["output"].shape or not torch.isfinite(found).all():
                differences[name + " (AOT)" * aot] = math.inf
                continue
            scale = max(float(batch["output"].abs().max()), 1e-12)
            differences[name + " (AOT)" * aot] = float((found - batch["output"]).abs().max()) / scale
    return differences, manifest["golden"]["tolerance"]


if __name__ == "__main__":
    found, tolerance = replay(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for name, difference in found.items():
        print(f"{name}: largest difference {difference:.3g}")
    sys.exit(any(difference > tolerance for difference in found.values()))
