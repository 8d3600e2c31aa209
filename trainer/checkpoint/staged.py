"""A copy in host memory of the part of a state that this rank writes, in the layout of its file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recpress.trainer.checkpoint.file_bytes import PAGE, new_checksum

State = dict[str, Any]
"""Name -> tensor (replicated, or of one rank alone) or ShardedTensor."""
Part = tuple[str, tuple[int, ...]]
"""(name of a tensor, offset of a part in it)."""
Block = tuple[int, torch.Tensor]
"""(offset in the file, bytes)."""
_BLOCK = 2 << 20  # bytes; still in the cache of a core when they are added to the checksum
_STAGE = 32 << 20  # bytes of a block on a GPU, and of each pinned buffer


class Staged:
    """The bytes of a rank's file, in one buffer that each copy reuses."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.size = 0
        """Bytes of the last copy; whole pages."""
        self.checksum = new_checksum()
        """Of the first `summed` bytes of the last copy."""
        self.summed = 0
        self._pinned: list[torch.Tensor] = []

    def copy(self, state: State, ranges: Mapping[Part, tuple[int, int]]) -> None:
        """Copy these parts of the state.

        Training waits for it on all ranks, so two threads share the work. One starts at the front and adds each block
        to the checksum while it is in the cache of its core. The other starts at the back. Blocks on a GPU are copied
        through two pinned buffers on a CUDA stream of their own, one filled while the other is emptied, and without a
        checksum, which would only make training wait.

        Args:
            ranges: part -> (offset in the file, length), in bytes; in the order of the file.
        """
        end = max((begin + length for begin, length in ranges.values()), default=0)
        self.size = -(-end // PAGE) * PAGE
        if self.size > self.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old buffer first
            self._memory = _pages(self.size)
        self.checksum, self.summed = new_checksum(), 0
        blocks = deque(_blocks(state, ranges))
        if all(block.device.type == "cpu" for _, block in blocks):
            with ThreadPoolExecutor(1) as pool:
                back = pool.submit(self._copy_back, blocks)
                self._copy_front(blocks)
                back.result()
        else:
            self._copy_back(deque(block for block in blocks if block[1].device.type == "cpu"))
            self._copy_from_device([block for block in blocks if block[1].device.type != "cpu"])

    def _copy_front(self, blocks: deque[Block]) -> None:
        memory = self._memory.numpy().data
        for begin, block in _taken(blocks.popleft):
            end = begin + len(block)
            self._memory[begin:end].copy_(block)
            if end - self.summed >= _BLOCK:
                self.checksum.update(memory[self.summed : end])
                self.summed = end

    def _copy_back(self, blocks: deque[Block]) -> None:
        for begin, block in _taken(blocks.pop):
            self._memory[begin : begin + len(block)].copy_(block)

    def _copy_from_device(self, blocks: Sequence[Block]) -> None:
        """`block.to("cpu")` would copy through CUDA's own small buffer, at a fraction of the bus's bandwidth."""
        device = blocks[0][1].device
        if not self._pinned:
            self._pinned = [torch.empty(_STAGE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        copied = [torch.cuda.Event() for _ in self._pinned]
        with torch.cuda.stream(stream):
            for number in range(len(blocks) + 1):
                if number < len(blocks):
                    _, block = blocks[number]
                    self._pinned[number % 2][: len(block)].copy_(block, non_blocking=True)
                    copied[number % 2].record(stream)
                if number:
                    begin, block = blocks[number - 1]
                    copied[(number - 1) % 2].synchronize()
                    self._memory[begin : begin + len(block)].copy_(self._pinned[(number - 1) % 2][: len(block)])

    @property
    def nbytes(self) -> int:
        """Of the buffer, which is as large as the largest copy so far."""
        return self._memory.nbytes

    @property
    def content(self) -> memoryview:
        """The bytes of the last copy."""
        return self._memory.numpy().data[: self.size]


def _blocks(state: State, ranges: Mapping[Part, tuple[int, int]]) -> Iterator[Block]:
    """These parts, in the order of the file, in blocks."""
    held = _held(state)
    for part, (begin, length) in ranges.items():
        source = held[part].contiguous().reshape(-1).view(torch.uint8)
        assert len(source) == length, f"{part}: {len(source)} bytes where the layout has {length}"
        step = _BLOCK if source.device.type == "cpu" else _STAGE
        for at in range(0, length, step):
            yield begin + at, source[at : at + step]


def _taken(take: Callable[[], Block]) -> Iterator[Block]:
    """Blocks until both threads have taken all."""
    while True:
        try:
            block = take()
        except IndexError:
            return
        yield block


def _held(state: State) -> dict[Part, torch.Tensor]:
    """The parts of a state on this rank."""
    found: dict[Part, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            found |= {(name, tuple(s.metadata.shard_offsets)): s.tensor.detach() for s in value.local_shards()}
        else:
            found[name, (0,) * value.dim()] = value.detach()
    return found


def _pages(size: int) -> torch.Tensor:
    """`size` bytes, whole pages, aligned to PAGE; zeros, so that padding contains no other memory."""
    memory = torch.from_numpy(np.zeros(size + PAGE, dtype=np.uint8))
    return memory[-memory.data_ptr() % PAGE :][:size]
