"""The tensors of served modules: small ones are part of the program, large ones are inputs of it.

A program with large tensors as inputs can be loaded without reading them: the caller passes memory-mapped tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(eq=False)
class LargeTensors:
    """The large tensors of one program, by name; shared by all of its modules.

    Not a module, so that torch.export sees them neither as buffers nor as constants.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """In the order of the program's last inputs."""
        return list(self.tensors)

    def bind(self, given: Sequence[torch.Tensor]) -> None:
        """Replace all tensors, in the order of `names`."""
        self.tensors = dict(zip(self.tensors, given, strict=True))


@dataclass(frozen=True)
class Stored:
    """A tensor of a served module."""

    tensor: torch.Tensor
    file: str | None = None
    """Name of the file that `tensor` maps, if it is large: it becomes an input of the program."""


class Holder(nn.Module):
    """A module whose tensors are buffers, or `LargeTensors`."""

    def __init__(self, large: LargeTensors) -> None:
        super().__init__()
        self._large = large
        self._file_of: dict[str, str] = {}

    def hold(self, name: str, stored: Stored) -> None:
        """Keep a tensor under `name`."""
        if stored.file is None:
            self.register_buffer(name, stored.tensor)
        else:
            self._file_of[name] = stored.file
            self._large.tensors[stored.file] = stored.tensor

    def held(self, name: str) -> torch.Tensor:
        """The tensor under `name`."""
        if name in self._file_of:
            return self._large.tensors[self._file_of[name]]
        return self.get_buffer(name)
