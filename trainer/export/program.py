"""Programs: a served module -> a file of torch.export, its entry of the manifest, and its golden batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recpress.data.errors import InputError
from recpress.modules.serving.tensors import LargeTensors
from recpress.trainer.export.tensors import ProgramTensors

BATCH = "batch"
MAX_BATCH = 1 << 20
"""Largest batch of a program."""
MAX_VALUES = 1 << 24
"""Most ids in the lists of one feature of a batch."""
GOLDEN_ROWS = 64
GOLDEN = "golden.pt"
TOLERANCE = 1e-4
"""Largest difference of a replayed golden batch, relative to the largest output: other CPUs add up in another order."""


@dataclass(frozen=True)
class Input:
    """One input of a program, a tensor with one dimension."""

    name: str
    dtype: torch.dtype
    meaning: str
    size: str = BATCH
    """Name of its size: `batch`, or that of the ids in the lists of a feature."""
    values: str = ""
    """Of lengths of lists: the size that they add up to."""

    @property
    def most(self) -> int:
        return MAX_BATCH if self.size == BATCH else MAX_VALUES

    def describe(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        entry = {"name": self.name, "dtype": dtype, "shape": [self.size], "meaning": self.meaning}
        return {**entry, "values": self.values} if self.values else entry


class _WithLargeTensors(nn.Module):
    """The module as a function of its inputs and then of its large tensors."""

    def __init__(self, module: nn.Module, large: LargeTensors, inputs: int) -> None:
        super().__init__()
        self.module, self._large, self._inputs = module, large, inputs

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self._large.bind(given[self._inputs :])
        return self.module(*given[: self._inputs])


@dataclass(frozen=True)
class Program:
    """A module whose forward takes the tensors of `inputs`."""

    name: str
    module: nn.Module
    tensors: ProgramTensors
    inputs: Sequence[Input]
    golden: Sequence[torch.Tensor]
    """A batch."""
    meaning: str
    """Of the output."""

    @torch.no_grad()
    def run(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs)

    def storage_error(self) -> float:
        """The largest difference that the storage of the rows makes to the golden batch, relative to the largest
        output."""
        hooks = [
            rows.register_forward_hook(lambda _, given, __, exact=exact: exact(given[0]))
            for rows, exact in self.tensors.exact.items()
        ]
        try:
            expected = self.run(*self.golden)
        finally:
            for hook in hooks:
                hook.remove()
        return float((self.run(*self.golden) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))

    def write(self, folder: Path, *, aot: bool) -> dict[str, Any]:
        """Write the program to `folder`; its entry of the manifest.

        Args:
            aot: compile it too.

        Raises:
            InputError: torch.export cannot trace the module; AOTInductor cannot compile it.
        """
        large = dict(self.tensors.large.tensors)
        compiled = self._compile(folder) if aot else None
        exported = self._exported(torch.device("cpu"))
        exported.example_inputs = None  # they would be saved too
        for node in exported.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(exported, folder / f"{self.name}.pt2")
        output = self.run(*self.golden)
        return {
            "file": f"{self.name}.pt2",
            "inputs": [part.describe() for part in self.inputs],
            "output": {"dtype": "float32", "shape": [BATCH, *output.shape[1:]], "meaning": self.meaning},
            "max": {part.size: part.most for part in self.inputs},
            "large": [
                {"file": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
                for name, tensor in large.items()
            ],
            "tables": self.tensors.tables,
            "bytes": self.tensors.nbytes,
            "storage_error": self.storage_error(),
            "aot": compiled,
        }

    def _exported(self, device: torch.device) -> torch.export.ExportedProgram:
        sizes = {part.size: part.most for part in self.inputs}
        dims = {size: torch.export.Dim(f"size{k}", min=0, max=most) for k, (size, most) in enumerate(sizes.items())}
        large = list(self.tensors.large.tensors.values())
        shapes = [*({0: dims[part.size]} for part in self.inputs), *(None for _ in large)]
        given = tuple(tensor.to(device) for tensor in (*self.golden, *large))
        module = _WithLargeTensors(self.module, self.tensors.large, len(self.inputs))
        try:
            with _quiet():
                return torch.export.export(module.to(device), given, dynamic_shapes=(tuple(shapes),), strict=False)
        except Exception as error:
            raise InputError(f"torch.export cannot trace the program '{self.name}': {_first_line(error)}") from error
        finally:
            module.cpu()
            self.tensors.large.bind(large)  # tracing replaced them

    def _compile(self, folder: Path) -> dict[str, str]:
        """Compile with AOTInductor, for this machine."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        file = f"{self.name}.aot.pt2"
        exported = self._exported(torch.device(device))
        try:
            with _quiet():
                torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / file))
        except Exception as error:
            raise InputError(f"AOTInductor cannot compile the program '{self.name}': {_first_line(error)}") from error
        processor = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {"file": file, "device": device, "processor": processor}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about its own code."""
    tracer = logging.getLogger("torch.fx._symbolic_trace")
    level = tracer.level
    tracer.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tracer.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_golden(folder: Path, programs: Sequence[Program]) -> dict[str, Any]:
    """Write the golden batch of all programs; its entry of the manifest."""
    golden = {
        program.name: {
            "inputs": {part.name: tensor for part, tensor in zip(program.inputs, program.golden, strict=True)},
            "output": program.run(*program.golden),
        }
        for program in programs
    }
    torch.save(golden, folder / GOLDEN)
    return {"file": GOLDEN, "tolerance": TOLERANCE}


def golden_ids(num_ids: int, generator: torch.Generator) -> torch.Tensor:
    """Random ids, the first and the last id, and two unknown ones."""
    ids = torch.randint(num_ids, (GOLDEN_ROWS - 4,), generator=generator)
    return torch.cat([ids, torch.tensor([0, num_ids - 1, num_ids, -1])])
