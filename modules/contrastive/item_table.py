"""Items, sharded over ranks, that the batches of all ranks read and change."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from recpress.modules.contrastive.batches import Batch
from recpress.modules.contrastive.row_adam import RowAdam


@dataclass
class Request:
    """Rows of this rank's shard that a step of all ranks reads."""

    own: torch.Tensor
    """Distinct local rows, (u,)."""
    place: torch.Tensor | None = None
    """Place in `own` of each row to send, in order of the ranks; None: `own` itself, on one rank."""
    sent: list[int] = field(default_factory=list)
    """Rows that each rank wants from here."""
    wanted: list[int] = field(default_factory=list)
    """Rows that this rank wants from each."""


class ItemTable:
    """This rank's block of the items. Its methods are collective."""

    def __init__(self, adam: RowAdam, num_items: int, exchange: Exchange) -> None:
        self.adam, self.exchange, self.blocks = adam, exchange, RowBlocks(num_items, exchange.world)

    def requests(self, batches: list[Batch]) -> list[Request]:
        """The requests of some steps, exchanged at once: a step itself then needs no sizes from other ranks."""
        exchange, device = self.exchange, self.exchange.device
        if exchange.world == 1:
            return [Request(torch.from_numpy(batch.items).to(device)) for batch in batches]
        stops = np.array([self.blocks.stop(rank) for rank in range(exchange.world)])
        ends = np.stack([np.searchsorted(batch.items, stops) for batch in batches])  # (steps, world)
        sizes = np.diff(ends, prepend=0, axis=1)
        cuts = [np.split(batch.items, end[:-1]) for batch, end in zip(batches, ends, strict=True)]
        received = exchange.all_to_all(list(np.ascontiguousarray(sizes.T))).reshape(exchange.world, len(batches))
        ids = exchange.all_to_all([np.concatenate([cut[rank] for cut in cuts]) for rank in range(exchange.world)])
        parts = np.split(ids - self.blocks.start(exchange.rank), np.cumsum(received.ravel())[:-1])
        found = []
        for step in range(len(batches)):
            asked = np.concatenate([parts[rank * len(batches) + step] for rank in range(exchange.world)])
            own, place = np.unique(asked, return_inverse=True)
            found.append(
                Request(
                    torch.from_numpy(own).to(device),
                    torch.from_numpy(place).to(device),
                    received[:, step].tolist(),
                    sizes[step].tolist(),
                )
            )
        return found

    def read(self, request: Request) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """(unit vectors of the items of this rank's batch, what `step` needs of the rows that were read)."""
        unit, inverse = self.adam.read(request.own)
        if request.place is None:
            return unit, (unit, inverse)
        asked = unit.index_select(0, request.place)
        return self.exchange.send(asked, request.sent, request.wanted)[0], (unit, inverse)

    def step(
        self, request: Request, read: tuple[torch.Tensor, torch.Tensor], gradient: torch.Tensor, rate: float
    ) -> None:
        """Move the rows along the sum of the ranks' gradients by their unit vectors."""
        if request.place is not None:
            parts = self.exchange.send(gradient, request.wanted, request.sent)[0]
            gradient = torch.zeros_like(read[0]).index_add_(0, request.place, parts)
        self.adam.step(request.own, *read, gradient, rate)
