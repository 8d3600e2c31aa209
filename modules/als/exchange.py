"""Collectives of the factorization. At world size 1 they need no process group."""

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
    """Collectives over the ranks of a process group.

    group: None for the default group, or for world size 1 if none is initialized.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        live = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if live else 0
        self.world = dist.get_world_size(group) if live else 1
        self.device = device

    @classmethod
    def of_default_group(cls) -> Exchange:
        """The default group, on a device that its backend supports: CUDA if the backend is only nccl, else the CPU."""
        nccl = dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
        return cls(None, torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu"))

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` on this rank, which must not contain collectives. Collective.

        If it fails on some ranks, all ranks raise, so that none waits: these ranks raise their own error, the others
        ValueError with the message of the lowest failed rank.
        """
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
        """Send parts[r] (n_r,) to rank r. Returns what this rank received, in rank order."""
        source = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.world == 1:
            return source
        sizes = [len(part) for part in parts]
        return self.send(torch.from_numpy(source).to(self.device), sizes)[0].cpu().numpy()

    def fetch_rows(self, shard: torch.Tensor, ids: torch.Tensor, blocks: RowBlocks) -> torch.Tensor:
        """Fetch rows `ids` (n,), ascending, of a table that is sharded by `blocks`, with `shard` here: (n, d)."""
        bounds = torch.tensor([blocks.stop(rank) for rank in range(self.world)], device=ids.device)
        ends = torch.searchsorted(ids.long(), bounds)
        requested = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        places, wanted = self.send(ids, requested)
        answer = shard.index_select(0, places.long() - blocks.start(self.rank))
        return self.send(answer, wanted, requested)[0]

    def gather(self, shard: torch.Tensor, blocks: RowBlocks) -> torch.Tensor:
        """All rows of a table that is sharded by `blocks`, with `shard` here: (num_rows, d)."""
        if self.world == 1:
            return shard
        whole = shard.new_empty((self.world * blocks.block, shard.shape[1]))
        missing = blocks.block - len(shard)  # only the last blocks are shorter, so row numbers stay valid
        mine = torch.nn.functional.pad(shard, (0, 0, 0, missing)) if missing else shard.contiguous()
        _gather(whole, mine, group=self.group)
        return whole[: blocks.num_rows]

    def send(
        self, source: torch.Tensor, sizes: list[int], received: list[int] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Send sizes[r] rows to rank r. Returns the received rows, and their number from each rank."""
        if received is None:
            counts = torch.empty(self.world, dtype=torch.int64, device=self.device)
            dist.all_to_all_single(counts, torch.tensor(sizes, device=self.device), group=self.group)
            received = counts.tolist()
        target = source.new_empty((sum(received), *source.shape[1:]))
        dist.all_to_all_single(target, source.contiguous(), received, sizes, group=self.group)
        return target, received

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def add_up(self, table: torch.Tensor, rows: int) -> None:
        """Sum a CPU table (n, d) over the ranks, in place, in parts of `rows` rows on the device."""
        if self.world > 1:
            for part in table.split(max(rows, 1)):
                part.copy_(self.sum(part.to(self.device)))

    def broadcast(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """The tensor of `rank`, on the device of `tensor`, which must have the same shape on every rank."""
        if self.world == 1:
            return tensor
        moved = tensor.to(self.device).contiguous()
        dist.broadcast(moved, group_src=rank, group=self.group)
        return moved.to(tensor.device)

    def max(self, value: int) -> int:
        """Maximum over the ranks."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)
