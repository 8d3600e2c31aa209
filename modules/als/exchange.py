"""Collectives of the factorization; in a world of one nothing moves and no process group is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from recpress.modules.als.factors import RowBlocks

_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on

T = TypeVar("T")


class Exchange:
    """The ranks of a process group: all-to-all of rows, sums and maxima.

    group: None stands for the default group, or for a world of one where none is initialized.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        live = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if live else 0
        self.world = dist.get_world_size(group) if live else 1
        self.device = device

    @classmethod
    def of_default_group(cls) -> Exchange:
        """On the device where the default group takes its tensors: the CPU, unless it knows nccl alone."""
        nccl = dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
        return cls(None, torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu"))

    def together(self, work: Callable[[], T]) -> T:
        """What `work`, which has no collectives, gives on this rank. Where it fails on some ranks, all raise: those
        their own error, the others ValueError with the text of the lowest of those, and none waits for another."""
        if self.world == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as found:
            error = found
        everyone: list[str | None] = [None] * self.world
        dist.all_gather_object(everyone, None if error is None else str(error), group=self.group)
        if error is not None:
            raise error
        for text in everyone:
            if text is not None:
                raise ValueError(text)
        return result  # type: ignore[return-value]

    def all_to_all(self, parts: list[np.ndarray]) -> np.ndarray:
        """parts[r] (n_r,) goes to rank r; returns what was sent here, concatenated in order of rank."""
        source = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.world == 1:
            return source
        sizes = [len(part) for part in parts]
        return self._send(torch.from_numpy(source).to(self.device), sizes)[0].cpu().numpy()

    def rows(self, shard: torch.Tensor, ids: torch.Tensor, blocks: RowBlocks) -> torch.Tensor:
        """Rows `ids` (n,), ascending, of the table whose `blocks` lie on the ranks, `shard` here: (n, d)."""
        bounds = torch.tensor([blocks.stop(rank) for rank in range(self.world)], device=ids.device)
        ends = torch.searchsorted(ids.long(), bounds)
        asked = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        places, wanted = self._send(ids, asked)
        answer = shard.index_select(0, places.long() - blocks.start(self.rank))
        return self._send(answer, wanted, asked)[0]

    def gather(self, shard: torch.Tensor, blocks: RowBlocks) -> torch.Tensor:
        """The whole table whose `blocks` lie on the ranks, `shard` here: (num_rows, d)."""
        if self.world == 1:
            return shard
        whole = shard.new_empty((self.world * blocks.block, shard.shape[1]))
        missing = blocks.block - len(shard)  # only of the last blocks, so that rows lie at their numbers
        mine = torch.nn.functional.pad(shard, (0, 0, 0, missing)) if missing else shard.contiguous()
        _gather(whole, mine, group=self.group)
        return whole[: blocks.num_rows]

    def _send(
        self, source: torch.Tensor, sizes: list[int], arriving: list[int] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Send sizes[r] rows to rank r; returns what arrived, and how much from each rank."""
        if arriving is None:
            counts = torch.empty(self.world, dtype=torch.int64, device=self.device)
            dist.all_to_all_single(counts, torch.tensor(sizes, device=self.device), group=self.group)
            arriving = counts.tolist()
        target = source.new_empty((sum(arriving), *source.shape[1:]))
        dist.all_to_all_single(target, source.contiguous(), arriving, sizes, group=self.group)
        return target, arriving

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def add_up(self, table: torch.Tensor, rows: int) -> None:
        """Sum a table (n, d) of the CPU over the ranks, in place, `rows` of it at a time on the device."""
        if self.world > 1:
            for part in table.split(max(rows, 1)):
                part.copy_(self.sum(part.to(self.device)))

    def broadcast(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """The tensor of `rank`, on the device of the argument, which has its shape on every rank."""
        if self.world == 1:
            return tensor
        moved = tensor.to(self.device).contiguous()
        dist.broadcast(moved, group_src=rank, group=self.group)
        return moved.to(tensor.device)

    def max(self, value: int) -> int:
        """Largest value of all ranks."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)
