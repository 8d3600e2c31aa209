"""A copy of a run's state in host memory, laid out so that a file of a checkpoint is a few straight writes of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from recpress.trainer.checkpoint.file_bytes import PAGE
from torch.distributed._shard.sharded_tensor import ShardedTensor

State = dict[str, Any]
"""Name -> tensor (replicated, or of one rank alone) or ShardedTensor."""
Part = tuple[str, tuple[int, ...]]
"""Name of a tensor, and where in it a part begins."""
_ALIGN = 64  # of a part in memory, in bytes: of any dtype, and of a cache line
_GAP = 64 << 10  # so many bytes of other parts are written along rather than begin another write


class Staged:
    """The parts of a state that this rank holds, in one piece of memory that serves for one copy after the other."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._lies: dict[Part, tuple[int, int]] = {}  # in the memory: begin, length in bytes

    @torch.no_grad()
    def copy(self, state: State) -> None:
        """Copy what this rank holds of the state."""
        tensors = _parts(state)
        end = 0
        self._lies = {}
        for part, tensor in tensors.items():
            self._lies[part] = (end, tensor.nbytes)
            end += -(-tensor.nbytes // _ALIGN) * _ALIGN
        if end > self.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old goes before the new comes
            self._memory = _pages(end)
        for part, tensor in tensors.items():
            begin, length = self._lies[part]
            self._memory[begin : begin + length].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    @property
    def nbytes(self) -> int:
        """Of the memory, which is as large as the largest state that was copied."""
        return self._memory.nbytes

    def file(self, parts: Iterable[Part]) -> tuple[list[memoryview], dict[Part, tuple[int, int]]]:
        """Whole pages of the memory which, one after the other, make a file that holds these parts; and where in the
        file each part lies (begin, length in bytes)."""
        runs: list[tuple[int, int]] = []
        size, found = 0, {}
        for part in sorted(parts, key=self._lies.__getitem__):
            begin, length = self._lies[part]
            first, last = begin // PAGE * PAGE, -(-(begin + length) // PAGE) * PAGE
            if runs and first <= runs[-1][1] + _GAP:
                size += max(0, last - runs[-1][1])
                runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
            else:
                size += last - first
                runs.append((first, last))
            found[part] = (size - runs[-1][1] + begin, length)
        memory = self._memory.numpy().data
        return [memory[first:last] for first, last in runs if last > first], found


def _parts(state: State) -> dict[Part, torch.Tensor]:
    """Shards first: each rank writes all of its own, and of what is replicated only some."""
    shards: dict[Part, torch.Tensor] = {}
    whole: dict[Part, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            shards |= {(name, tuple(s.metadata.shard_offsets)): s.tensor.detach() for s in value.local_shards()}
        else:
            whole[name, (0,) * value.dim()] = value.detach()
    return shards | whole


def _pages(size: int) -> torch.Tensor:
    """Bytes at a multiple of PAGE, `size` of them and what is left of the last page; zeros, so that nothing else that
    was in memory comes into a file."""
    whole = -(-size // PAGE) * PAGE
    memory = torch.from_numpy(np.zeros(whole + PAGE, dtype=np.uint8))
    return memory[-memory.data_ptr() % PAGE :][:whole]
